"""A trainer hook: follow a training in TensorBoard.

    pip install ./examples/plugins/tensorboard_hook
    cryodrgn train_amort particles.mrcs ... --tensorboard -o run
    tensorboard --logdir run/tensorboard

The x axis counts particles, all epochs together. It has the losses of each batch, and of each epoch
all that is in metrics.csv, the learning rate, and where the particles are in the first two latent
dimensions.
"""

from __future__ import annotations

import argparse

from cryodrgn_amort import hookimpl

AT_ONCE = 100  # batches


class TensorBoard:
    """A plugin may be an object: it keeps what it needs from one hook to the next.

    Hooks take those of their arguments that they want. Of several processes that train together,
    the leading one alone calls them.
    """

    def __init__(self) -> None:
        self.writer = None
        self.losses = []

    @hookimpl
    def train_args(self, parser):
        """Add a flag; not given, the hooks below do nothing."""
        parser.add_argument(
            "--tensorboard",
            action="store_true",
            default=argparse.SUPPRESS,
            help="Log to TensorBoard, into the folder `tensorboard` of the run",
        )

    @hookimpl
    def training_start(self, trainer):
        """Open the log. A run that goes on hides what it had logged beyond its checkpoint."""
        self.writer, self.losses = None, []
        if trainer.settings.extra.get("tensorboard"):
            # imported here: plugins are loaded whenever `cryodrgn` starts
            from torch.utils.tensorboard import SummaryWriter

            folder = trainer.folder / "tensorboard"
            self.writer = SummaryWriter(str(folder), purge_step=trainer.seen + 1)

    @hookimpl
    def batch_end(self, trainer, losses):
        """Keep the losses; to read them now would make a GPU wait after every batch."""
        if self.writer is not None:
            self.losses.append((trainer.seen, losses))
            if len(self.losses) == AT_ONCE:
                self._write_losses()

    def _write_losses(self) -> None:
        for seen, losses in self.losses:
            for name in ("loss", "gen_loss", "kld"):
                value = losses.total if name == "loss" else getattr(losses, name)
                self.writer.add_scalar(f"batch/{name}", value.item(), seen)
        self.losses.clear()

    @hookimpl
    def epoch_end(self, trainer, metrics):
        """Write the epoch's row of metrics.csv, and the learning rate."""
        if self.writer is not None:
            self._write_losses()
            rate = trainer.optimizer.param_groups[0]["lr"]
            for name, value in {**metrics, "lr": rate}.items():
                self.writer.add_scalar(f"epoch/{name}", value, trainer.seen)
            self.writer.flush()

    @hookimpl
    def checkpoint_written(self, trainer, path):
        """Show the latents, which are in the z file beside the weights."""
        if self.writer is not None and trainer.settings.zdim > 1:
            from matplotlib.figure import Figure

            from cryodrgn_amort.core import read_z

            mean, _ = read_z(path.with_name(path.name.replace("weights", "z")), "RUN")
            figure = Figure(figsize=(5, 5), layout="constrained")
            axes = figure.add_subplot(xlabel="z1", ylabel="z2")
            axes.hexbin(mean[:, 0], mean[:, 1], gridsize=40, bins="log", mincnt=1)
            self.writer.add_figure("z", figure, trainer.seen)

    @hookimpl
    def training_end(self):
        """Close the log."""
        if self.writer is not None:
            self.writer.close()


plugin = TensorBoard()
