"""Images that a run leaves out since they cannot be read (DATA.bad_images: skip)."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import nn

from sanctl.config.schema import Config
from sanctl.data.loader import Batch
from sanctl.engine.team import ALONE, Team
from sanctl.errors import SanctlError
from sanctl.report.console import printable
from sanctl_models import Network

FILE = "skipped_images.txt"
_CPU = torch.device("cpu")


class SkippedImages:
    """Counts the images left out of some batches, and lists them in a file, each once.

    Args:
        folder: Gets `skipped_images.txt`: a line of part, path and reason for each, with tabs
            between them. What stands there already is kept.
        part: "train", "val" or "test".
        note: Takes a sentence for the user.
        whole: Whether the batches are all of the part, not the rest of an epoch.
        team: The processes that share the batches: each lists what it left out, and hears of all.
        device: Where the team's sums are taken.
    """

    def __init__(
        self,
        folder: Path,
        part: str,
        note: Callable[[str], None],
        whole: bool = True,
        team: Team = ALONE,
        device: torch.device = _CPU,
    ) -> None:
        self._path = folder / FILE
        self._part = part
        self._note = note
        self._whole = whole
        self._team = team
        self._device = device
        self._listed = self._read()
        self.numbers: set[int] = set()
        self.used = 0
        self._alone = 0

    def usable(
        self,
        batches: Iterable[Batch],
        too_small: Callable[[Batch], bool] = lambda _: False,
        blank: Batch | None = None,
    ) -> Iterator[Batch | None]:
        """Yield every batch, or `blank` in place of one of which too little is left.

        Raises:
            SanctlError: No image at all could be used, or the list cannot be written.
        """
        for batch in batches:
            if batch.skipped:
                self._add(batch)
            images = len(batch.indices)
            if batch.skipped and images and too_small(batch):
                self._alone += images
                yield blank
            else:
                self.used += images
                yield batch if len(batch.images) else blank
        self._finish()

    def _add(self, batch: Batch) -> None:
        self.numbers |= {skipped.number for skipped in batch.skipped}
        lines = [
            f"{self._part}\t{printable(skipped.name)}\t{printable(skipped.reason)}\n"
            for skipped in batch.skipped
        ]
        new = [line for line in dict.fromkeys(lines) if line not in self._listed]
        self._listed.update(new)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(new)
        except OSError as error:
            raise SanctlError(
                f"cannot write {self._path}: {error.strerror or error}; the images that are left "
                "out must be listed"
            ) from error

    def _finish(self) -> None:
        sums = torch.tensor([self.used, len(self.numbers), self._alone], device=self._device)
        self._team.sum_(sums)
        used, skipped, left_alone = sums.tolist()
        if not skipped:
            return
        if not used and self._whole:
            raise SanctlError(
                f"none of the {self._part} images can be read; {self._path} says why of each"
            )
        alone = f"; with them {left_alone} left alone in a batch" if left_alone else ""
        self._note(
            f"{self._part}: {used} images used, {skipped} left out that cannot be read, listed in "
            f"{self._path}{alone}"
        )

    def _read(self) -> set[str]:
        try:
            return set(self._path.read_text(encoding="utf-8").splitlines(keepends=True))
        except (OSError, UnicodeDecodeError):
            return set()


def too_small_to_normalise(
    model: nn.Module, config: Config, device: torch.device
) -> Callable[[Batch], bool]:
    """Return what tells batches that batch normalisation cannot be trained on.

    Those are the batches of which a part (TRAIN.accumulate) has one image, where the network's last
    feature maps are single pixels.
    """
    size, channels = config.DATA.image_size, config.DATA.in_chans

    def too_small(batch: Batch) -> bool:
        if all(len(part) > 1 for part in batch.indices.chunk(config.TRAIN.accumulate)):
            return False
        training = model.training
        needs = needs_several_images(model, torch.zeros(1, channels, size, size, device=device))
        model.train(training)
        return needs

    return too_small


@torch.no_grad()
def needs_several_images(model: nn.Module, image: torch.Tensor) -> bool:
    """Whether a network cannot be trained on one image: its last feature maps are single pixels.

    Batch normalisation has nothing to take a variance of there.

    Args:
        model: The network; it is put into the mode of evaluation.
        image: (1, C, H, W), of the size that is trained on.
    """
    assert isinstance(model, Network)
    return model.eval().feature_maps(image).shape[2:].numel() == 1
