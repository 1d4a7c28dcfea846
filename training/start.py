"""What both training commands do before their first step, in one order: images, device, loader, the run's folder."""

import pathlib

from dataloader import Loader
from images.dataset import check_batch_size, open_data
from settings.subjects import DataConfig, Images, Training, deciding
from space import own
from training import distributed
from training.compiled import prepare_compiler
from training.evaluation import resolve_device, validation_batches
from training.run import TrainingRun, contents_of
from utils import log


class Start:
    """The settings `values` (name -> value) of a training command, and what they name: images and device.

    `kind` is "supernet" or "scratch", and the name of the folder in OUT/checkpoints; `config` is a DataConfig, by
    default that of the settings.
    """

    def __init__(self, kind, values, config=None):
        self.kind = kind
        self.values = values
        self.config = config or DataConfig.resolve(DataConfig.given(values))
        self.training = Training.of(values)
        self.image_settings = Images.of(values)
        self.seed = values["seed"]
        self.folder = pathlib.Path(values["out"]) / "checkpoints" / kind
        self.data = distributed.local_rank0_first(lambda: open_data(self.image_settings, self.config, values["demo"]))
        self.device = resolve_device(values["device"], values["threads"])

    def loader(self, part, augment=False):
        """The Loader of a part of the images: "supernet", "search", "train" or "val"."""
        settings = self.image_settings
        how = self.seed, self.device, settings.loader, settings.workers, settings.cache, settings.memory_gb
        return Loader(self.data.images(part), self.config, augment, *how)

    def validation(self, part):
        """Validation batches of a part of the images."""
        return validation_batches(self.loader(part), self.image_settings.eval_batch_size, self.image_settings.cache)

    def run(self, space, loader, **contents):
        """The TrainingRun in a SearchSpace with a Loader, locked and with its log; `contents` are those of checkpoints.

        Raises UserError, before anything is written, if the settings allow no training.
        """
        check_batch_size(len(loader.images), self.training.batch_size)
        distributed.per_rank_batch_size(self.training.batch_size, self.training.micro_batch)
        if self.training.compile:
            prepare_compiler(self.device, self.image_settings.cache, space.n_widths)
        settings = deciding(self.values) | {"loader": loader.backend}
        if code := own.hash_of("rule", self.training.rule):
            settings["rule_code"] = code
        if self.training.warmup >= self.training.iterations:
            steps = f"--warmup {self.training.warmup} of {self.training.iterations} --iterations"
            self.data.warnings.append(f"{steps}: the learning rate never reaches --lr {self.training.lr}")
        contents |= {"counts": self.data.counts, "images": self.data.names}
        contents = contents_of(space, self.config, self.data.classes, **contents)
        run = TrainingRun(self.folder, self.kind, contents, settings)
        anew = self.training.resume == "none"
        run.start(self.device, self.seed, anew, self.data.warnings, self.values)
        # A resumed run keeps its loader.
        if distributed.rank() == 0 and not run.content and (advice := loader.advice()):
            log.info(advice)
        return run
