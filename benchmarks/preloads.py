"""Which packages can be preloaded: each in a template of its own, from which a rank is forked that uses the package.

    make preloads

prints the table of docs/guide/warm.md. The rank's program is run cold first: what does not work then says nothing of a
warm start.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
import tempfile
import textwrap
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

from rankspawn import Template, launch

# By the name of the distribution: what is preloaded, and what the rank does then.
PACKAGES: dict[str, tuple[list[str], str]] = {
    "numpy": (
        ["numpy"],
        """
        import numpy as np
        a = np.ones((700, 700))
        assert (a @ a)[0, 0] == 700
        """,
    ),
    "scipy": (
        ["scipy.linalg"],
        """
        import numpy as np, scipy.linalg as l
        l.svd(np.ones((300, 300)))
        """,
    ),
    "scikit-learn": (
        ["sklearn.datasets", "sklearn.linear_model"],
        """
        from sklearn.datasets import load_digits
        from sklearn.linear_model import LogisticRegression as L
        x, y = load_digits(return_X_y=True)
        L(max_iter=20).fit(x[:200], y[:200])
        """,
    ),
    "pandas": (
        ["pandas"],
        """
        import pandas as pd
        frame = pd.DataFrame({'a': [1, 1], 'b': [2, 3]})
        assert frame.groupby('a').sum().b[1] == 5
        """,
    ),
    "pyarrow": (
        ["pyarrow", "pyarrow.compute", "pyarrow.parquet"],
        """
        import io, pyarrow as pa, pyarrow.compute as pc, pyarrow.parquet as pq
        t = pa.table({'a': list(range(10**6))})
        f = io.BytesIO()
        pq.write_table(t, f)
        f.seek(0)
        assert pc.sum(pq.read_table(f)['a']).as_py() == sum(range(10**6))
        """,
    ),
    "torch": (
        ["torch", "torch.distributed"],
        """
        import os, torch, torch.distributed as d
        assert torch.ones(4_000_000).sum() == 4_000_000
        torch.ones(300, 300) @ torch.ones(300, 300)
        d.init_process_group('gloo', rank=0, world_size=1, init_method='file://' + os.environ['STORE'])
        t = torch.ones(3)
        d.all_reduce(t)
        d.destroy_process_group()
        """,
    ),
    "torch, torch._dynamo": (
        ["torch", "torch._dynamo"],
        """
        import torch
        m = torch.nn.Linear(8, 8)
        o = torch.optim.Adam(m.parameters())
        m(torch.ones(4, 8)).sum().backward()
        o.step()
        assert torch.compile(lambda x: x + 1, backend='eager')(torch.ones(2)).sum() == 4
        """,
    ),
    "torchvision": (
        ["torchvision", "torchvision.transforms.v2"],
        """
        import torch, torchvision
        torchvision.models.resnet18()(torch.ones(1, 3, 64, 64))
        """,
    ),
    "transformers": (
        ["transformers", "transformers.models.bert.modeling_bert"],
        """
        import torch
        from transformers import BertConfig, BertModel
        c = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
        BertModel(c)(torch.ones(1, 4, dtype=torch.long))
        """,
    ),
    "accelerate": (
        ["accelerate"],
        """
        import torch
        from accelerate import Accelerator
        a = Accelerator(cpu=True)
        a.prepare(torch.nn.Linear(2, 2))
        """,
    ),
    "lightning": (
        ["lightning"],
        """
        import lightning, torch
        fabric = lightning.Fabric(accelerator='cpu', devices=1)
        fabric.launch()
        fabric.setup(torch.nn.Linear(2, 2))
        """,
    ),
    "jax": (
        ["jax", "jax.numpy"],
        """
        import jax, jax.numpy as n
        assert jax.jit(lambda x: x @ x)(n.ones((300, 300)))[0, 0] == 300
        """,
    ),
    "datasets": (
        ["datasets"],
        """
        import datasets
        rows = datasets.Dataset.from_dict({'a': [1, 2]})
        assert rows.map(lambda row: {'b': row['a']})['b'][:] == [1, 2]
        """,
    ),
    "grpcio": (
        ["grpc"],
        """
        import grpc
        from concurrent.futures import ThreadPoolExecutor
        server = grpc.server(ThreadPoolExecutor(2))
        port = server.add_insecure_port('127.0.0.1:0')
        methods = {'m': grpc.unary_unary_rpc_method_handler(lambda request, context: request)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler('s', methods),))
        server.start()
        with grpc.insecure_channel(f'127.0.0.1:{port}') as channel:
            assert channel.unary_unary('/s/m')(b'x', timeout=20) == b'x'
        server.stop(0).wait()
        """,
    ),
    "wandb": (
        ["wandb"],
        """
        import wandb
        run = wandb.init(mode='offline', dir='.', settings=wandb.Settings(silent=True))
        run.log({'a': 1})
        run.finish()
        """,
    ),
    "tensorboard": (
        ["torch.utils.tensorboard"],
        """
        from torch.utils.tensorboard import SummaryWriter
        w = SummaryWriter('.')
        w.add_scalar('a', 1)
        w.close()
        """,
    ),
    "ray": (
        ["ray"],
        """
        import ray
        ray.init(num_cpus=1, include_dashboard=False)
        assert ray.get(ray.put(1)) == 1
        ray.shutdown()
        """,
    ),
    "polars": (
        ["polars"],
        """
        import polars as p
        assert p.DataFrame({'a': [1, 2]}).lazy().sum().collect()['a'][0] == 3
        """,
    ),
    "numba": (
        ["numba"],
        """
        import numba
        assert numba.njit(lambda x: x + 1)(1) == 2
        """,
    ),
    "opencv-python-headless": (
        ["cv2"],
        """
        import cv2, numpy as n
        cv2.GaussianBlur(n.zeros((400, 400, 3), n.uint8), (9, 9), 0)
        """,
    ),
    "matplotlib": (
        ["matplotlib.pyplot"],
        """
        import matplotlib.pyplot as p
        p.plot([1, 2])
        p.savefig('x.png')
        """,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="PACKAGE", help=f"(default: all of {', '.join(PACKAGES)})")
    parser.add_argument("--distributions", action="store_true", help="print what has to be installed")
    options = parser.parse_args()
    if options.distributions:
        print(*dict.fromkeys(name.partition(",")[0] for name in PACKAGES))
        return
    print("| preloaded | version | imported in | threads that stay | a forked rank |")
    print("| --- | --- | --- | --- | --- |")
    for name in options.names or PACKAGES:
        print(f"| {' | '.join(row(name))} |", flush=True)


def row(name: str) -> list[str]:
    """One line of the table."""
    modules, program = PACKAGES[name]
    distribution = name.partition(",")[0]
    shown = ", ".join(f"`{module}`" for module in modules)
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return [shown, "-", "-", "-", "it is not installed here"]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, Template(modules) as template:
        cold, _ = used(program, Path(folder, "cold"), False)
        if cold:
            return [shown, version, "-", "-", f"cold, too: {cold}"]
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            warm, mechanism = used(program, Path(folder, "warm"), template)
        (report,) = template.report()[:1] or [None]
        seconds = sum(report["modules"].values()) if report else 0
        result = warm or ("works" if mechanism == "warm" else "is started cold, and works")
        why = "; ".join(str(one.message).partition("started cold: ")[2] or str(one.message) for one in said)
        return [shown, version, f"{seconds:.1f} s", threads(template), f"{result}: {why}" if why else result]


def threads(template: Template) -> str:
    found = [len(stem.prepared.get("threads", ())) for _, stem in template._stems]
    return str(found[0]) if found else "-"


def used(program: str, folder: Path, warm: Template | bool) -> tuple[str, str]:
    """Run the program as two ranks: what went wrong, or nothing; and how they were started."""
    folder.mkdir()
    folder.joinpath("use.py").write_text(textwrap.dedent(program))
    until = time.monotonic() + 240
    with launch(
        [sys.executable, "use.py"], 2, cwd=folder, log_dir=folder / "logs", warm=warm, numa=None, keep_going=True,
        rank_env=[{"STORE": str(folder / f"store{rank}"), "WANDB_DIR": str(folder)} for rank in range(2)], grace=0,
    ) as group:  # fmt: skip
        mechanism = "warm" if {rank.mechanism for rank in group.ranks} == {"warm"} else "cold"
        try:
            status = any(group.wait(max(1, until - time.monotonic())))
        except TimeoutError:
            return "hangs", mechanism
    return (last_line(folder) if status else ""), mechanism


def last_line(folder: Path) -> str:
    logs = [(folder / "logs" / "attempt_0" / str(rank) / "stderr.log").read_text() for rank in range(2)]
    lines: Sequence[str] = "\n".join(logs).strip().splitlines()
    return f"fails: {lines[-1][:100]}" if lines else "fails"


if __name__ == "__main__":
    main()
