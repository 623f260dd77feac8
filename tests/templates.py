"""Chat templates in many styles, and tokenizers that make seams in different ways."""

from functools import cache

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


def turns(user: str, assistant: str, opening: str = "", end: str = "") -> str:
    """A template that writes ``user`` and ``assistant`` with the content ``CONTENT`` of each turn."""
    user, assistant = (text.replace("CONTENT", "{{ m['content'] }}") for text in (user, assistant))
    turn = f"{{% if m['role'] == 'user' %}}{user}{{% else %}}{assistant}{{% endif %}}"
    return f"{opening}{{% for m in messages %}}{turn}{{% endfor %}}{end}"


def alike(turn: str, opening: str = "", end: str = "") -> str:
    """A template that writes every turn alike, with ``ROLE`` and ``CONTENT``."""
    turn = turn.replace("ROLE", "{{ m['role'] }}").replace("CONTENT", "{{ m['content'] }}")
    return f"{opening}{{% for m in messages %}}{turn}{{% endfor %}}{end}"


CHATML = "<|im_start|>ROLE\nCONTENT<|im_end|>\n"
THINKING = "<|im_start|>assistant\n<think>\n\n</think>\n\nCONTENT<|im_end|>\n"
ASKED = "<|im_start|>user\nCONTENT<|im_end|>\n"
TEMPLATES = {
    "chatml": alike(CHATML) + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "system turn": alike(CHATML, "<|im_start|>system\nYou are kind.<|im_end|>\n"),
    "think block": turns(ASKED, THINKING),
    "thinking by argument": turns(ASKED, THINKING)
    + "{% if add_generation_prompt and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}",
    "thoughts are dropped": turns(ASKED, "<|im_start|>assistant\n{{ m['content'].split('</think>')[-1] }}<|im_end|>\n"),
    "prompt of its own": turns("<|user|>CONTENT", "<|assistant|>CONTENT</s>")
    + "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}",
    "space before the end": turns("<s>[INST] CONTENT [/INST]", " CONTENT </s>"),
    "strips": turns("<s>[INST] {{ m['content'].strip() }} [/INST]", "{{ ' ' + m['content'].strip() + ' ' + '</s>' }}"),
    "space before the answer": turns("<s>[INST] CONTENT [/INST]", " CONTENT</s>"),
    "no spaces": turns("<s>[INST]CONTENT[/INST]", "CONTENT</s>"),
    "headers": alike("<|im_start|>ROLE<|im_end|>\n\n{{ m['content'] | trim }}</s>", "<s>"),
    "roles on lines": alike("<|ROLE|>\nCONTENT</s>\n").replace("<|{{ m['role'] }}|>", "{{ '<|' + m['role'] + '|>' }}"),
    "two ends": alike("<|user|>\nCONTENT<|im_end|>\n", end="{% if not add_generation_prompt %}</s>{% endif %}"),
    "end on a line": turns("<|user|>\nCONTENT\n", "<|assistant|>\nCONTENT\n</s>\n"),
    "words alone": turns("USER: CONTENT ", "ASSISTANT: CONTENT</s>", "Be kind. "),
    "words on lines": turns("User: CONTENT\n\n", "Assistant: CONTENT</s>"),
    "headings": turns("### Instruction:\nCONTENT\n\n", "### Response:\nCONTENT\n</s>", "Below is a task.\n\n"),
    "spaces around": turns("<s> CONTENT ", "<|assistant|> CONTENT </s>"),
    "many spaces": turns("<s>   CONTENT   \n", "  \n  CONTENT  </s>"),
    "only white space between": turns("CONTENT\n", "CONTENT</s>"),
    "letters outside ASCII": turns("<\u7528\u6237>CONTENT", "<AI>CONTENT</s>"),
    "end of the user is the end": alike("CONTENT</s>"),
    "channels": turns("<|im_start|>user<|user|>CONTENT<|im_end|>", "<|im_start|>assistant<|user|>CONTENT</s>", "<s>"),
    "date by argument": alike(CHATML, "<|im_start|>system\nToday is {{ date_string }}.<|im_end|>\n"),
    "numbered": "{% for m in messages %}{{ loop.index }}. {{ m['content'] }}{{ eos_token if loop.last }}\n{% endfor %}",
    "length of the question": turns("{{ m['content'] | length }}|CONTENT|", "CONTENT</s>"),
    "colon at the seam": turns("Q:CONTENT\nA:", "CONTENT</s>"),
    "lines at the seam": turns("CONTENT\n\n\n", "\nCONTENT</s>\n\n"),
}
# What they are refused with.
REFUSED = {
    "no end": (turns("<|user|>CONTENT", "<|assistant|>CONTENT"), "no special token ends an answer"),
    "end in words": (turns("User: CONTENT\n", "Bot: CONTENT\n"), "no special token ends an answer"),
    "question twice": (turns("CONTENT CONTENT", "CONTENT</s>"), "no template that shows a question and an answer"),
    "no answers": (turns("CONTENT", "</s>"), "no template that shows a question and an answer"),
    "capitals": (turns("CONTENT", "{{ m['content'] | upper | lower }}</s>"), "no template that shows"),
    "quoted": (turns("user: {{ m['content'] | tojson }}\n", 'answer: "CONTENT"</s>'), "no template that shows"),
    "parts": (turns("{{ m['content'][0]['text'] }}", "CONTENT</s>"), "no template that shows"),
    "length of the answer": (
        turns("CONTENT", "{{ m['content'] | length }} CONTENT</s>"),
        "joins the answer .* stands where .* is expected",
    ),
}
# Templates whose seams a tokenizer joins with what stands beside them, differently for each text.
JOINED = [("only white space between", "byte level"), ("letters outside ASCII", "words alone")]
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>"]
CORPUS = ["the answer is yes, USER: ASSISTANT: Output: [INST] [/INST]\n\n\n### Response: castle  moon  \n 42. (no)"] * 9


def byte_level() -> Tokenizer:
    """Words with the space before them, as of GPT-2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    return tokenizer


def marked() -> Tokenizer:
    """A mark before every word and every piece between special tokens, as of Llama 2."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    words = [piece for text in CORPUS for piece in text.replace(" ", " \u2581").split(" ")]
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=pieces, show_progress=False)
    tokenizer.train_from_iterator(words, trainer)
    return tokenizer


def words_alone() -> Tokenizer:
    """A mark before every word, which is a unit, as of T5."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


TOKENIZERS = {"byte level": byte_level, "marked": marked, "words alone": words_alone}


@cache
def trained(kind: str) -> PreTrainedTokenizerBase:
    """A tokenizer of a kind, without a template."""
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=TOKENIZERS[kind](), **tokens, extra_special_tokens=SPECIAL, clean_up_tokenization_spaces=False
    )
