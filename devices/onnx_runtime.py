"""Networks in ONNX Runtime, on the CPU: the graph of any candidate, put together from operations exported once.

torch.onnx takes one to two seconds for anything, and up to four for a network. So one export has every operation at
every shape of a block, beside each other, with stem and head, and graphs of networks are put together from it in
milliseconds. Such a graph has the nodes of a network that was exported as a whole, as `scratch.py --export` does, by
the same exporter: BN folded, any batch size. But images come in as float (N, 3, H, W): preprocessing is not part of it.

Source of the options: ONNX Runtime's documentation, "Thread management", and its defaults.
"""

import dataclasses
import functools
import importlib.util
import warnings
from importlib import metadata

import torch

from devices import on_device
from devices.on_device import open_session
from devices.timing import Runtime, build, random_images
from settings.subjects import ONNX_PACKAGES
from utils import UserError, log

TOLERANCE = 1e-3  # an exported operation's outputs may differ by this share of the largest one
INPUT = "images"


def missing():
    """The command that installs what is missing, or None."""
    names = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    return f"pip install {' '.join(names)}" if names else None


def version():
    """The version of ONNX Runtime, or None where it is not installed."""
    try:
        return metadata.version("onnxruntime")
    except metadata.PackageNotFoundError:
        return None


class OnnxRuntime(Runtime):
    """Networks in ONNX Runtime: CPU provider, default optimisations, as many threads as torch has.

    A session is opened anew in each round, since hundreds of them would not fit into memory. Only `session.run` is
    timed. Raises UserError if a package is missing, a space has widths, or an operation can't be exported.
    """

    NAME = "onnxruntime"
    ROUNDS, SECONDS, FEWEST = on_device.ROUNDS, on_device.SECONDS, on_device.FEWEST
    WARM_UP, RUNS = on_device.WARM_UP, on_device.RUNS

    def __init__(self, space, batch_size):
        if install := missing():
            raise UserError(f"--runtime onnxruntime: needs {install}")
        if space.n_widths > 1:
            raise UserError(
                "--runtime onnxruntime: a space with widths has too many choices to be measured in whole networks; "
                "leave it out"
            )
        self.graphs = graphs_of(dataclasses.replace(space, given_costs=None))
        device = torch.device("cpu")
        super().__init__(
            space, batch_size, device, {INPUT: random_images(space, batch_size, device).contiguous().numpy()}
        )

    def prepare(self, candidate):
        return lambda: functools.partial(session(self.graphs.network(candidate)).run, None)


@functools.lru_cache(maxsize=1)
def graphs_of(space):
    """The Graphs of a space; those of the last one are kept, for further measurements of a search."""
    return Graphs(space)


def session(content):
    """The session of a graph, in bytes."""
    return open_session(content, torch.get_num_threads())


class _Beside(torch.nn.Module):
    """Runs each of some parts on an input of its own."""

    def __init__(self, parts):
        super().__init__()
        self.parts = torch.nn.ModuleList(parts)

    def forward(self, *inputs):
        return [part(x) for part, x in zip(self.parts, inputs)]


class _Head(torch.nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network.head(x)


class Graphs:
    """The parts of a space's networks as ONNX graphs; each is compared with torch before it is used."""

    def __init__(self, space):
        import onnx.compose
        import onnx.utils

        self.space = space
        parts = self._parts()
        log.info("exporting %d operations to ONNX", len(parts))
        self.model = _export(parts)
        cut = onnx.utils.Extractor(self.model)
        graphs = {}
        for i, (key, (module, example)) in enumerate(parts.items()):
            part = cut.extract_model([f"input{i}"], [f"output{i}"])
            _compare(key, part, module, example)
            graphs[key] = part.graph
        # Each block has tensors of its own, as in a network.
        self.blocks = [
            [onnx.compose.add_prefix_graph(graphs[name, shape], f"{block}/") for name in names]
            for block, (names, shape) in enumerate(zip(space.block_operations, space.blocks))
        ]
        self.stem = onnx.compose.add_prefix_graph(graphs["stem", None], "stem/")
        self.head = onnx.compose.add_prefix_graph(graphs["head", None], "head/")

    def _parts(self):
        """{(name of an operation, BlockShape) or (name of another part, None): (module, example of its input)}."""
        space = self.space
        found = {}
        for choice in range(max(space.n_choices)):
            candidate = space.uniform_candidate(choice)
            network = build(space, candidate, torch.device("cpu"))
            for module, shape, (name, _) in zip(network.features, space.blocks, space.chosen(candidate)):
                found.setdefault((name, shape), (module, _example(shape.in_channels, shape.in_size)))
        last = space.blocks[-1]
        found["stem", None] = network.first_conv, _example(space.image_channels, space.input_size)
        found["head", None] = _Head(network), _example(last.out_channels, last.out_size)
        return found

    def network(self, candidate):
        """The ONNX model of a candidate, as bytes: its input is `images`."""
        import onnx

        chosen = [row[choice] for row, choice in zip(self.blocks, self.space.block_choices(candidate))]
        whole = onnx.GraphProto(name="network")
        whole.input.add().CopyFrom(self.stem.input[0])
        whole.input[0].name = INPUT
        before = INPUT
        for graph in (self.stem, *chosen, self.head):  # ONNX Runtime removes these nodes
            whole.node.append(onnx.helper.make_node("Identity", [before], [graph.input[0].name]))
            whole.node.extend(graph.node)
            whole.initializer.extend(graph.initializer)
            before = graph.output[0].name
        whole.output.append(self.head.output[0])
        model = onnx.ModelProto(ir_version=self.model.ir_version, opset_import=self.model.opset_import, graph=whole)
        model.functions.extend(self.model.functions)
        return model.SerializeToString()


def _example(channels, size):
    return torch.randn(2, channels, size, size)


def _export(parts):
    """The ONNX model that has all parts beside each other: input0 -> output0, and so on, any batch size."""
    try:
        return _to_onnx(parts)
    except Exception:  # a user's operation may raise anything
        for key in parts:
            try:
                _to_onnx({key: parts[key]})
            except Exception as error:
                raise _failure(key, error) from None
        raise


def _to_onnx(parts):
    modules = [module for module, _ in parts.values()]
    examples = tuple(example for _, example in parts.values())
    batch = torch.export.Dim("batch")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = torch.onnx.export(
            _Beside(modules).eval(), examples, dynamo=True, verbose=False,
            dynamic_shapes=(tuple({0: batch} for _ in examples),),
            input_names=[f"input{i}" for i in range(len(examples))],
            output_names=[f"output{i}" for i in range(len(examples))],
        ).model_proto  # fmt: skip
    for node in model.graph.node:
        node.ClearField("metadata_props")  # with the paths of this machine
    return model


def _compare(key, part, module, example):
    """Raises UserError if a part gives another output in ONNX Runtime than in torch, at another batch size too."""
    with torch.no_grad():
        for x in (example, example[:1]):
            expected = module(x)
            try:
                (found,) = session(part.SerializeToString()).run(None, {part.graph.input[0].name: x.numpy()})
            except Exception as error:
                raise _failure(key, error) from None
            difference = (torch.from_numpy(found) - expected).abs().max()
            if not difference <= TOLERANCE * expected.abs().max():
                raise _failure(key, ValueError(f"its outputs differ by {difference:.2g}"))


def _failure(key, error):
    name, shape = key
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    where = f"operation {name!r} at {shape}" if shape else name
    return UserError(f"--runtime onnxruntime: {where}: can't be exported to ONNX ({reason})")
