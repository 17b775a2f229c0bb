"""Text from Hugging Face `datasets`, streamed: a dataset of the hub by name, or a local dataset folder."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mfdist.errors import DataError
from mfdist.training.data.documents import Document, record_text, text_pieces
from mfdist.training.data.text_files import TextFiles

#: Hub datasets are sampled by shuffling among this many records at a time.
_SHUFFLE_RECORDS = 1000


class HuggingFaceDataset:
    """`hf:NAME[:CONFIG[:SPLIT]]`: NAME is a name on the hub or a local folder; SPLIT is `train` unless given."""

    num_bytes: int | None = None

    def __init__(self, source: str, *, text_field: str) -> None:
        spec = source.removeprefix("hf:")
        self._source, self._text_field = source, text_field
        self._name, _, rest = (spec, "", "") if Path(spec).is_dir() else spec.partition(":")
        config, _, split = rest.partition(":")
        self._config, self._split = config or None, split or "train"
        self.position_bytes = 0
        if not self._name:
            raise DataError(f'data.source must be hf:NAME[:CONFIG[:SPLIT]]; got "{source}"')

    @property
    def identity(self) -> str:
        """The name and, for a local folder, the names, sizes and times of its files.

        The hub is not asked: a dataset that changes there under the same name is not noticed.
        """
        listing = TextFiles(self._name, text_field="", suffixes=None).identity if Path(self._name).is_dir() else "hub"
        return f"hf {self._name}:{self._config or ''}:{self._split} {self._text_field} {listing}"

    def documents(self, *, on_skip: Callable[[str], None], shuffle_seed: int | None = None) -> Iterator[Document]:
        """Yield one document a record; see `Source.documents`."""
        self.position_bytes = 0
        found = False
        last_skip = ""
        for number, record in self._records(shuffle_seed):
            name = f"{self._split}:{number}"
            try:
                text = record_text(record, self._text_field)
            except DataError as error:
                last_skip = f"{self._source} record {number}: {error}"
                on_skip(last_skip)
                continue
            self.position_bytes += len(text)
            for document in text_pieces(name, text):
                found = True
                yield document
        if not found:
            raise DataError(f"a dataset must hold text; none in {self._source}; {last_skip or 'it has no records'}")

    def _records(self, shuffle_seed: int | None) -> Iterator[tuple[int, Any]]:
        try:
            numbered = enumerate(self._load())
            yield from numbered if shuffle_seed is None else _shuffled(numbered, shuffle_seed)
        except DataError:
            raise
        except Exception as error:  # the library raises many kinds: its own, OSError, ValueError, network errors
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(
                f"a Hugging Face dataset must load; {self._source} does not: {reason[:300]}; check the name, the"
                f" configuration and the split, given as hf:NAME:CONFIG:SPLIT"
            ) from error

    def _load(self) -> Any:
        try:
            import datasets
        except ImportError:
            raise DataError(
                f"reading {self._source} needs the package datasets, which is not installed; pip install 'mfdist[hf]'"
            ) from None
        folder = Path(self._name)
        if any((folder / marker).is_file() for marker in ("state.json", "dataset_dict.json")):
            saved = datasets.load_from_disk(str(folder))
            return saved[self._split] if isinstance(saved, datasets.DatasetDict) else saved
        return datasets.load_dataset(self._name, name=self._config, split=self._split, streaming=True)


def _shuffled(numbered: Iterator[tuple[int, Any]], seed: int) -> Iterator[tuple[int, Any]]:
    """Shuffle within windows; unlike the library's shuffle it keeps each record's number, on which its split hangs."""
    chooser, window = random.Random(seed), []
    for item in numbered:
        window.append(item)
        if len(window) == _SHUFFLE_RECORDS:
            chooser.shuffle(window)
            yield from window
            window.clear()
    chooser.shuffle(window)
    yield from window
