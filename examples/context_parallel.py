"""A long context on several devices: each keeps its own tokens of it, compressed.

    torchrun --nproc-per-node 2 examples/context_parallel.py
    torchrun --nproc-per-node 2 examples/context_parallel.py HuggingFaceTB/SmolLM2-1.7B-Instruct

Without a model a tiny random one is made. Every rank prints what its cache takes and the time of a
step, beside that of a step's collectives alone; the first one also runs the model in one process,
dense, and says whether the tokens are the same. They are with the ratio 0, which stores every
channel as it is; other formats are approximations.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import spark_compile
from spark_compile.transformers_names import cache_argument, returned_cache


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=512, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=4, initializer_range=0.1,
        max_position_embeddings=1 << 20,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def milliseconds(step: Callable[[], object], times: int = 16) -> float:
    """The median; all ranks begin a step together."""
    taken = []
    for _ in range(times):
        dist.barrier()
        start = time.perf_counter()
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", help="a folder, or a name on the Hugging Face hub")
    parser.add_argument("--tokens", type=int, default=1000, help="of the prompt")
    parser.add_argument("--key-ratio", type=float, default=0.0)
    parser.add_argument("--inner", default="eager", choices=["inductor", "eager", "aot_eager"])
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()

    def load() -> torch.nn.Module:
        model = AutoModelForCausalLM.from_pretrained(args.model) if args.model else tiny_model()
        return model.eval().to(device)

    ids = torch.randint(1, 500, (1, args.tokens), generator=torch.Generator().manual_seed(0))
    ids = ids.to(device)
    how = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 32, "do_sample": False}
    model = spark_compile.optimize(
        load(), context_parallel=dist.group.WORLD, key_ratio=args.key_ratio, inner=args.inner
    )
    output = model.generate(ids, **how, return_dict_in_generate=True)
    cache, latest = returned_cache(output), output.sequences[:, -1:]
    given = {cache_argument(type(model).forward): cache}

    query = model.config.num_attention_heads * (model.config.head_dim + 1)
    part = torch.zeros(query, device=device)
    parts = torch.zeros(ranks * query, device=device)
    with torch.no_grad():
        step_ms = milliseconds(lambda: model(latest, **given))
    layers = model.config.num_hidden_layers
    collective_ms = layers * milliseconds(lambda: dist.all_gather_into_tensor(parts, part))
    print(
        f"rank {rank} of {ranks}: {spark_compile.kv_bytes(cache)} bytes of keys and values, "
        f"{step_ms:.2f} ms per token, of which {collective_ms:.2f} ms in {layers} collectives",
        flush=True,
    )

    if rank == 0:
        same = torch.equal(load().generate(ids, **how), output.sequences)
        print(f"the tokens are {'' if same else 'not '}those of one process", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
