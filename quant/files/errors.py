"""The one error that tells a person what is wrong with a file."""


class FileRefused(ValueError):
    """A file that cannot be used: the message is one sentence that names the file, what is wrong
    and what to do.
    """


class DiskRefused(FileRefused):
    """The disk does not take what would be written; the same work may succeed another time."""
