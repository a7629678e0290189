"""The end of a run that is no failure."""


class StoppedError(Exception):
    """A run ended because it was told to; the message says how to go on."""
