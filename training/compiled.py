"""Training steps whose operations torch.compile has compiled (--compile): a Step that runs a part in another way."""

import contextlib
import getpass
import os
import pathlib
import time
import types

import torch

from blocks import Narrow
from training import distributed
from training.step import Buffers, Step
from utils import UserError, duration, heartbeat, log, private_folder

BACKEND = "inductor"  # torch.compile's
NO_WIDTHS = "--compile: operations of several widths can't be compiled; leave it out"


class CompiledStep(Step):
    """A Step that compiles every part of the model at its first step, by passes that change nothing.

    Equal parts share a graph. Raises UserError if torch can't compile a part.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if not hasattr(self.model, "candidates_with_all"):
            raise UserError(f"compile: {type(self.model).__name__} has no candidates_with_all(), which it needs")
        self.functions = {}  # (structure of a part, shape of its input) -> compiled function
        self.of_part = {}

    def train_one_step(self, number, images, labels, candidate=None):
        if not self.of_part:
            size = self.training.micro_batch or len(images)
            distributed.local_rank0_first(lambda: self._compile(images[:size], labels[:size]))
        with torch_compiler("fail_on_recompile"):
            return super().train_one_step(number, images, labels, candidate)

    def run_part(self, part, x):
        if part not in self.of_part:
            heartbeat()
            if isinstance(part, Narrow):
                raise UserError(NO_WIDTHS)
            self.of_part[part] = self._function(str(part), x.shape)
        return self.of_part[part](part, x)

    def _compile(self, images, labels):
        start = time.perf_counter()
        with torch_compiler("default"):
            for candidate in self.model.candidates_with_all():
                torch.manual_seed(0)
                loss = self.criterion(self.forward(candidate, images), labels)
                self.scaler.scale(loss).backward()
        self.changed[0].restore()
        self.changed = [Buffers(self.known)]
        n, graphs = len(self.of_part), len(self.functions)
        took = duration(time.perf_counter() - start)
        log.info("compiled stem, operations and last convolution, %d modules as %d graphs, in %s", n, graphs, took)

    def _function(self, *key):
        # Dynamo compares a call with the graphs of a function's code one after the other, and compiles no more than 8
        # of them, so every graph has a copy of the code of its own.
        if key not in self.functions:
            code = _call.__code__.replace(co_name=f"part_{len(self.functions)}")
            function = types.FunctionType(code, globals())
            self.functions[key] = torch.compile(function, fullgraph=True, dynamic=False, backend=BACKEND)
        return self.functions[key]


def _call(part, x):
    return part(x)


@contextlib.contextmanager
def torch_compiler(stance):
    """Within the block torch.compile has a stance ("fail_on_recompile"); what it can't compile is a UserError."""
    try:
        with torch.compiler.set_stance(stance):
            yield
    except RuntimeError as error:
        if "fail_on_recompile" in str(error):
            text = "an operation's input has another form than those before, and would be compiled again"
        elif isinstance(error, torch._dynamo.exc.TorchDynamoException):
            cause = str(error).partition("Set TORCHDYNAMO")[0].split()
            text = f"torch can't compile an operation ({' '.join(cause)[:300]})"
        else:
            raise
        raise UserError(f"--compile: {text}; leave it out") from None


def prepare_compiler(device, cache, n_widths=1):
    """Has torch.compile keep its results in a folder below `cache`; they are code, so it is this user's alone.

    Raises UserError if torch lacks what it needs to compile for the device, if there are widths to choose from, or if
    others can write to the folder.
    """
    if n_widths > 1:
        raise UserError(NO_WIDTHS)
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            raise UserError("--compile: torch finds no Triton that compiles for this GPU; leave it out")
    else:
        from torch._inductor import cpp_builder

        try:
            cpp_builder.get_cpp_compiler()
        except RuntimeError:
            raise UserError(
                "--compile: no C++ compiler, neither g++ nor that of CXX; install one, or leave it out"
            ) from None
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(private_folder(pathlib.Path(cache) / f"compiled-{getpass.getuser()}"))
