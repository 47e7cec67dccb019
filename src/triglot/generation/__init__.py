"""Text in, text out: a trained run behind a few calls, and files translated line by line.

Models are made ready here to take steps on a processor; the loops that take them are in `decoding`.
"""
