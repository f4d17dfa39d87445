"""A package of cubins that has every kernel, each cubin its kernel's name."""

from nibble.kernels.backends.cubins import library


class EveryKernel(library.Package):
    """Nothing in it is code: for drivers that load anything."""

    def __init__(self) -> None:
        self.absent, self.manifest = "", {"compiler": "none"}

    def has(self, arch: str) -> bool:
        return True

    def find(self, kernel, arch: str) -> library.Cubin:
        return library.Cubin(kernel.name.encode(), kernel.name)
