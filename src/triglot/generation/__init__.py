"""Text in, text out: a trained run behind a few calls, and files translated line by line."""
