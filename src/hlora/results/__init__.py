"""What a study found: read, compared, drawn, judged against the paper."""
