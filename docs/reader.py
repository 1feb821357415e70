"""Reads one rank of a shard directory with the standard library alone. docs/format.md explains what it reads.

python docs/reader.py OUT 3          rank 3: each tensor, and which part of the model it is
"""

import json
import mmap
import struct
import sys
from pathlib import Path


def open_rank(directory, rank):
    """({name: (dtype, shape, bytes)}, {name: segments}) of one rank; the bytes are views of the mapped file."""
    root = Path(directory)
    manifest = json.loads((root / "manifest.json").read_text("utf-8"))
    if manifest["reshard"].split(".")[0] != "1":
        raise ValueError(f"{directory}: format version {manifest['reshard']}, this reader knows 1")
    if not 0 <= rank < len(manifest["ranks"]):
        raise ValueError(f"{directory}: there is no rank {rank}, only ranks 0 to {len(manifest['ranks']) - 1}")
    listed = manifest["ranks"][rank]
    index = json.loads((root / listed["tensors"]["file"]).read_text("utf-8"))
    path = root / listed["weights"]["file"]
    # a truncated file under mmap kills the process, or reads as zeros
    if path.stat().st_size != listed["weights"]["size"]:
        raise ValueError(f"{path}: {path.stat().st_size} bytes, the manifest says {listed['weights']['size']}")
    with path.open("rb") as file:
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    (length,) = struct.unpack("<Q", data[:8])
    about = json.loads(bytes(data[8 : 8 + length]))["__metadata__"]
    if (about["reshard.plan"], about["reshard.rank"]) != (manifest["plan"], str(rank)):
        raise ValueError(f"{path}: belongs to another conversion or another rank")
    for t in index["tensors"]:
        if not 8 + length <= t["offset"] <= t["offset"] + t["nbytes"] <= len(data):
            raise ValueError(f"{path}: {t['name']} is said to be at byte {t['offset']}, which is not in the data")
    tensors = {
        t["name"]: (t["dtype"], tuple(t["shape"]), data[t["offset"] : t["offset"] + t["nbytes"]])
        for t in index["tensors"]
    }
    return tensors, {t["name"]: index["rows"][t["row"]].get("segments", []) for t in index["tensors"]}


def main():
    tensors, segments = open_rank(sys.argv[1], int(sys.argv[2]))
    for name, (dtype, shape, data) in tensors.items():
        print(f"{name}  {dtype} {list(shape)}  {len(data)} bytes")
        for segment in segments[name]:
            parts = [f"{axis} {low}:{high} of {segment['of'][axis]}" for axis, (low, high) in segment["box"].items()]
            print(f"    from element {segment['offset']}: {segment['tensor']}, {', '.join(parts)}")


if __name__ == "__main__":
    main()
