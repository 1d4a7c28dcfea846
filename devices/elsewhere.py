"""Latencies of another device: a folder with networks and a script that times them there, and what it found.

The networks are those that would be timed here, with one file of weights for all of them. Their names only count
choices, so networks.json has the space that they are of. results.json:

    device, onnxruntime    the name of the device, the version of ONNX Runtime
    threads, batch_size    with how many threads, and of how many images
    ns                     {name of a file, without .onnx: [ns of a run; the same, measured again, if it was]}

`on_device.py` writes it; onnxruntime_perf_test can fill it, too.
"""

import hashlib
import pathlib
import shutil

from devices import on_device
from utils import UserError, output_folder, read_json, write_json

MOST_BYTES = 10**9  # in a folder
SHARED_BYTES, ALIGNED = 128, 64  # a tensor as large lies in the file of weights, at a multiple


def results_path(folder):
    return pathlib.Path(folder) / "results.json"


def name_of(candidate):
    return "-".join(map(str, candidate))


def write_folder(folder, runtime, candidates, threads):
    """Writes the networks of candidates of an OnnxRuntime, and what times them; returns (their number, bytes).

    Raises UserError if they would fill gigabytes, or the folder can't be written.
    """
    from onnx import load_from_string

    reference = runtime.space.uniform_candidate(0)
    candidates = list(dict.fromkeys([reference, *candidates]))
    weights, places, files = bytearray(), {}, {}
    for candidate in candidates:
        model = load_from_string(runtime.graphs.network(candidate))
        for tensor in model.graph.initializer:
            if len(tensor.raw_data) >= SHARED_BYTES:
                _share(tensor, weights, places)
        files[f"{name_of(candidate)}.onnx"] = model.SerializeToString()
        size = len(files[f"{name_of(candidate)}.onnx"]) * len(candidates) + len(weights)
        if size > MOST_BYTES:
            text = f"{len(candidates)} networks would fill {size / 1e9:.1f} GB, of {MOST_BYTES / 1e9:.1f} at most"
            raise UserError(f"--elsewhere {folder}: {text}; choose a smaller space")
    folder = output_folder(folder)
    for path in folder.glob("*.onnx"):
        if path.stem.replace("-", "").isdigit():  # of another space; on_device.py would time it, too
            path.unlink()
    for name, content in (files | {"weights.bin": weights}).items():
        (folder / name).write_bytes(content)
    setup = {"input": list(runtime.x["images"].shape), "threads": threads, "reference": name_of(reference)}
    write_json(folder / "networks.json", {**setup, "space": runtime.space.to_dict()})
    shutil.copy(on_device.__file__, folder)
    return len(candidates), sum(map(len, files.values())) + len(weights)


def _share(tensor, weights, places):
    """Moves the values of a tensor into the file of weights, where they are not there already."""
    key = hashlib.sha256(tensor.raw_data).digest()
    if key not in places:
        weights.extend(bytes(-len(weights) % ALIGNED))
        places[key] = len(weights)
        weights.extend(tensor.raw_data)
    found = {"location": "weights.bin", "offset": places[key], "length": len(tensor.raw_data)}
    tensor.ClearField("raw_data")
    tensor.data_location = tensor.EXTERNAL
    for name, value in found.items():
        tensor.external_data.add(key=name, value=str(value))


def read_results(folder, space, candidates):
    """(results.json, {candidate: (ns, ns measured again, or the same)}) of a folder. Raises UserError if it has none,
    or lacks one of the candidates, or if its networks are of another space."""
    setup = pathlib.Path(folder) / "networks.json"
    written = read_json(setup) if setup.exists() else None
    found = written.get("space") if isinstance(written, dict) else None  # folders of before have none
    if found and found != space.to_dict():
        text = "its networks are of another search space; remove this folder, or name another one"
        raise UserError(f"{folder}: {text}")
    path = results_path(folder)
    results = read_json(path)
    kinds = {"device": str, "onnxruntime": str, "threads": int, "batch_size": int, "ns": dict}
    if not isinstance(results, dict) or not all(type(results.get(name)) is kind for name, kind in kinds.items()):
        raise UserError(f"{path}: not what on_device.py writes; it needs {', '.join(kinds)}")
    found = {}
    advice = "measure this folder again, or remove it first to have its networks written anew"
    for candidate in candidates:
        times = results["ns"].get(name_of(candidate))
        if type(times) is not list or not times or not all(type(ns) in (int, float) and 0 < ns < 1e12 for ns in times):
            raise UserError(f"{path}: has no nanoseconds of {name_of(candidate)}.onnx; {advice}")
        found[candidate] = times[0], times[-1]
    return results, found
