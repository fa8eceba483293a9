"""A small Qwen2 folder with an R1-style tokenizer, made on the spot: what stands in for R1-Distill-Qwen in the tests.

python tests/small_model.py FOLDER          # writes the model and a file of questions beside it
"""

import json
import sys
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

BOS, EOS = "<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>"
USER, ASSISTANT = "<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}" + USER + "{{ m['content'] }}"
    "{% else %}" + ASSISTANT + "{{ m['content'] }}" + EOS + "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}" + ASSISTANT + "<think>\n{% endif %}"
)


def questions(n: int = 40) -> list[dict]:
    """Return word problems with their answers, in the layout of the data files."""
    rows = []
    for i in range(n):
        a, b, c = 3 + i % 9, 2 + i % 5, 1 + i % 7
        text = f"Ann has {a} boxes with {b} apples each. She eats {c}. How many apples are left?"
        rows.append({"problem": text, "answer": str(a * b - c), "level": 1 + i % 3})
    return rows


def make_tokenizer(corpus: list[str]) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer with R1's control tokens: turn marks special, thinking marks ordinary."""
    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    pieces.train_from_iterator(corpus, trainer)
    pieces.add_special_tokens([BOS, EOS])
    pieces.add_tokens([AddedToken(t, normalized=False) for t in (USER, ASSISTANT, "<think>", "</think>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=pieces, bos_token=BOS, eos_token=EOS, pad_token=EOS, chat_template=TEMPLATE
    )


def make_folder(folder: Path, seed: int = 0) -> Path:
    """Write the model to `folder` and questions.jsonl beside it; return the path of the questions."""
    torch.manual_seed(seed)
    data = folder.parent / "questions.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    rows = questions()
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = make_tokenizer([row["problem"] for row in rows] + ["The answer is \\boxed{12}. Let me think."])
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return data


if __name__ == "__main__":
    print(make_folder(Path(sys.argv[1])))
