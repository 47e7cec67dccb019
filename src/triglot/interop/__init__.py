"""Checkpoints of other libraries, in and out: what each family's names and settings are called here."""
