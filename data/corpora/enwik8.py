"""enwik8: the first 100,000,000 bytes of the English Wikipedia dump of 3 March 2006.

Source: Matt Mahoney, http://mattmahoney.net/dc/textdata.html. The usual split: 90 million bytes
for training, then 5 million for validation and 5 million for the test.
"""

from data.corpora.byte_file import ByteFile
from data.prepare.download import fetch_unpacked
from data.prepare.files import sha256_of

URL = "http://mattmahoney.net/dc/enwik8.zip"
ZIP_SHA256 = "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc"
RAW_SHA256 = "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8"
RAW_BYTES = 100_000_000


class Enwik8(ByteFile):
    """enwik8, and no other file.

    Args:
        path: the file, as it is or compressed; None takes it from the cache, where it is
            downloaded to if it is not there.
        cache: folder for what is downloaded or unpacked.
    """

    def __init__(self, path: str | None, cache: str):
        self.downloads = path is None
        path = f"{cache}/enwik8/enwik8" if path is None else path
        super().__init__(path, cache, fractions=(0.9, 0.05, 0.05))

    def prepare(self) -> None:
        """Download if needed, and check every byte; for one process of each machine.

        Raises:
            ValueError: if the file is not enwik8.
            OSError: if it cannot be read, downloaded, or written for want of space.
        """
        if self.downloads and not self.path.exists():
            fetch_unpacked("enwik8", URL, self.path, sha256=ZIP_SHA256)
        super().prepare()
        self._verify()

    def _verify(self) -> None:
        size = self.raw.stat().st_size
        found, expected = f"{size:,} bytes", f"{RAW_BYTES:,} bytes"
        if size == RAW_BYTES:
            found, expected = f"SHA-256 {sha256_of(self.raw)}", f"SHA-256 {RAW_SHA256}"
        if found != expected:
            remedy = "; delete it to download it again" if self.downloads else ""
            raise ValueError(
                f"{self.path} is not enwik8, it has {found} instead of {expected}; train on it "
                f"with data=bytes data.path={self.path}{remedy}."
            )
