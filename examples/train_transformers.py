"""Fine-tune a causal language model of Hugging Face with transformers.Trainer and a sparse adapter.

    python examples/train_transformers.py --out adapter.safetensors
    python examples/train_transformers.py --model ./my-llama --text notes.txt --targets "(q|v)_proj$" --density 0.01

Without --model a tiny Llama with random weights learns a few bytes by heart: offline, on a CPU, in seconds. A --model
is a local folder with weights and a tokenizer.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import shira

TEXT = "An adapter is, for each weight it changes, which entries change and what they become. " * 20


def tiny() -> tuple[Any, list[int]]:
    """A Llama that reads bytes."""
    torch.set_num_threads(1)  # so small a model gains nothing from more
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=256, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config), list(TEXT.encode())


def local(folder: Path, text: Path | None) -> tuple[Any, list[int]]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return model, tokenizer(text.read_text() if text else TEXT)["input_ids"]


def rows(tokens: list[int], length: int) -> list[dict[str, Tensor]]:
    pieces = torch.tensor(tokens[: len(tokens) // length * length]).view(-1, length)
    return [{"input_ids": piece, "labels": piece} for piece in pieces]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="local folder of a causal language model and its tokenizer")
    parser.add_argument("--text", type=Path, help="what to train on, with --model")
    parser.add_argument("--out", type=Path, default=Path("adapter.safetensors"), help="where to save the adapter")
    parser.add_argument("--targets", default=r"_proj$|embed|lm_head", help="regular expression over names of layers")
    parser.add_argument("--density", type=float, default=0.1, help="share of the entries that train")
    parser.add_argument("--length", type=int, default=64, help="tokens in a row")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--lr", type=float, default=3e-2)
    args = parser.parse_args()

    transformers.set_seed(0)
    model, tokens = local(args.model, args.text) if args.model else tiny()
    data = rows(tokens, args.length)

    tuner = shira.SparseTuner(model, shira.masks.Rand(density=args.density), targets=args.targets)
    print(tuner.summary())
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder, max_steps=args.steps, per_device_train_batch_size=4, logging_steps=20, report_to=[],
            learning_rate=args.lr, weight_decay=0.0, save_strategy="no", use_cpu=not torch.cuda.is_available(),
            disable_tqdm=True,
        )  # fmt: skip
        # Any optimizer of transformers trains the values; ours steps and writes the weights in one pass.
        optimizer = shira.AdamW(tuner, lr=args.lr, weight_decay=0.0)
        trainer = transformers.Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None))
        before = trainer.evaluate(data)["eval_loss"]
        trainer.train()
        after = trainer.evaluate(data)["eval_loss"]
    print(f"loss {before:.3f} before, {after:.3f} after")

    adapter = tuner.adapter(provenance={"steps": args.steps, "lr": args.lr})
    adapter.save(args.out)
    print(f"{adapter} saved as {args.out}, {args.out.stat().st_size:,} bytes")
    tuner.detach()
    print(f"loss {trainer.evaluate(data)['eval_loss']:.3f} on the base, which is back bit for bit")


if __name__ == "__main__":
    main()
