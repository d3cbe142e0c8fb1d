"""Readers of model files, one for each kind: every part that reads such a file reads it here."""
