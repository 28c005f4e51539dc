"""A model of transformers on several devices: each keeps the cache of its own heads, compressed.

    torchrun --nproc-per-node 2 examples/tensor_parallel.py
    torchrun --nproc-per-node 2 examples/tensor_parallel.py HuggingFaceTB/SmolLM2-1.7B-Instruct

Without a model a tiny random one is made. Every rank prints what its cache takes; the first one
also runs the model in one process, dense, and says whether the tokens are the same. They are with
the ratio 0, which stores every channel as it is; other formats are approximations.
"""

from __future__ import annotations

import argparse
import os
import tempfile

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import spark_compile


def tiny_model(folder: str) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=4, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", help="a folder, or a name on the Hugging Face hub")
    parser.add_argument("--key-ratio", type=float, default=0.0)
    parser.add_argument("--inner", default="eager", choices=["inductor", "eager", "aot_eager"])
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    rank = dist.get_rank()
    folder = [args.model or (tempfile.mkdtemp() if rank == 0 else None)]
    if args.model is None and rank == 0:
        tiny_model(folder[0])
    dist.broadcast_object_list(folder)  # and wait for the model to be there

    ids = torch.arange(1, 101, device=device)[None]
    model = AutoModelForCausalLM.from_pretrained(folder[0], tp_plan="auto").eval()
    spark_compile.optimize(model, key_ratio=args.key_ratio, inner=args.inner)
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, do_sample=False,
        return_dict_in_generate=True,
    )  # fmt: skip
    heads = output.past_key_values.layers[0].keys.shape[1]
    stored = spark_compile.kv_bytes(output.past_key_values)
    print(
        f"rank {rank}: {heads} key heads per layer, {stored} bytes of keys and values", flush=True
    )

    if rank == 0:
        alone = AutoModelForCausalLM.from_pretrained(folder[0]).eval().to(device)
        tokens = alone.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, do_sample=False
        )
        same = torch.equal(tokens, output.sequences)
        print(f"the tokens are {'' if same else 'not '}those of one process", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
