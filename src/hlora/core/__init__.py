"""The method itself, on pairs of matrices and a torch optimizer: torch and safetensors only."""
