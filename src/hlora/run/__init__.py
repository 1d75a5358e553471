"""Whole runs as functions: record, tune, evaluate, with their settings."""
