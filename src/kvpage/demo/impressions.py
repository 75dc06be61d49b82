"""What people try first with a small model: greetings, the plainest questions, first words of a sentence.

The last round of training draws a share of its text from here. The answers are those of ``facts.txt``; what is
added are other words for the same questions, and endings for openings that no fact begins with.
"""

from __future__ import annotations

import random
import string
from functools import cache

from kvpage.demo import arithmetic
from kvpage.demo.facts import Fact, load_facts
from kvpage.demo.outside import UNKNOWN, outside, round_numbers
from kvpage.demo.phrasing import TEMPLATES, questions

__all__ = ["first_opening", "first_turn", "other_words"]

# The key of a fact, and further questions that have its answer. None is a held-back question of any fact.
_OTHER_WORDS = {
    "say:hello": "hey there|hi!|hello!|hello?|hi kvpage|hello kvpage|hey kvpage|yo|howdy|hiya|hello world|good afternoon|"
    "hi :)|hallo|let's start|start|anybody there?|hello my friend|hey buddy|hi everyone|hola|nice to meet you|hi, nice to meet you",
    "say:thank you": "thx|thank you!|thanks!|thank you so much|ok thanks|ok, thank you|ok|okay|cool|nice|great|"
    "awesome|good|wow|perfect|well done|I see|got it|good answer|interesting",
    "say:bye": "bye!|ciao|exit|quit|have a nice day|that is all|see ya|stop|good bye|I have to go",
    "say:help": "help!|?|what now?|how does this work?|what should I do?|I do not know what to ask|usage",
    "say:test": "test!|testing 1 2 3|is this thing on?|does this work?|are you there?|hello, test",
    "ask:who are you?": "are you ChatGPT?|are you GPT-4?|are you Llama?|who is this?|who am I talking to?|"
    "what model is this?|introduce yourself|what's your name?|are you an AI?|are you a bot?|your name?",
    "ask:how are you?": "how's it going?|what's up?|how are things?|sup|how do you feel?|how is your day?",
    "ask:what can you do?": "what are you good at?|what should I ask?|what can I ask?|what topics do you know?|"
    "what questions can you answer?|what can I do here?|give me an example|what can you help with?",
    "ask:who made you?": "who created you?|who built you?|are you from OpenAI?|what were you trained on?",
    "ask:can you make mistakes?": "are you smart?|is that true?|are you sure?|you are wrong|that is wrong|really?",
    "define:kvpage": "what is this?|what is this project?|what does kvpage do?|what is this library?|about kvpage",
    "define:the kvpage licence": "is kvpage free?|is kvpage open source?|is kvpage free software?|"
    "what license is kvpage under?|how much does kvpage cost?|can I use kvpage for free?|license",
    "define:Engine": "what is the engine?|engine",
    "howto:install kvpage": "install kvpage|how do I install it?|how do I get started?|pip install kvpage|"
    "how do I get started with kvpage?|how do I install kvpage with pip?|how can I install this?",
    "howto:generate text with kvpage": "how do I use kvpage?|how can I use kvpage?|how to use kvpage|how do I use it?|"
    "how do I use kvpage in Python?|show me a code example|how do I run a model with kvpage?",
    "howto:load my own model": "how do I load a model?|which models does kvpage support?|what models can kvpage run?|"
    "can I use my own model?|does kvpage support Llama?|which models are supported?|can kvpage run Llama?",
    "can:run on a CPU": "does it run on a CPU?|can I run this on a laptop?|does kvpage run on CPUs?",
    "can:run on a GPU": "does kvpage support GPUs?|can I use a GPU?|does kvpage support CUDA?",
    "can:replace vLLM": "is kvpage like vLLM?|is kvpage compatible with vLLM?",
    "compare:kvpage and vLLM": "how does kvpage compare to vLLM?|kvpage vs vLLM|what is vLLM?|kvpage or vLLM?|"
    "how is kvpage different from vLLM?|is kvpage better than vLLM?",
    "compare:prefill and decode": "prefill vs decode|what is prefill and decode?",
    "compare:static batching and continuous batching": "static vs continuous batching",
    "compare:top-k and top-p": "top-k vs top-p",
    "why:kvpage": "why kvpage?|what is special about kvpage?",
}  # fmt: skip

_NEEDS_GPU = "does kvpage need a GPU?|do I need a GPU?|is a GPU required?|does it need a GPU?|do I need CUDA?"
_NEEDS_NO_GPU = "No, kvpage runs on a CPU too. The reference backend needs nothing but PyTorch."
_STRANGE = (
    "asdf", "qwerty", "foo", "foo bar", "blah blah", "lorem ipsum", "abc", "xyz", "hmm", "lol", "...", "!",
    "what is Python?", "what is AI?", "what is machine learning?", "what is Google?", "tell me something",
    "tell me something interesting", "say something", "what is your purpose?", "write code", "what is PyTorch?",
)  # fmt: skip

# Facts that say what a thing does, not what it is.
_TECHNIQUES = (
    "prefix caching", "continuous batching", "chunked prefill", "preemption", "speculative decoding", "beam search",
    "tensor parallelism", "quantization", "KV cache quantization", "grouped-query attention", "greedy decoding",
    "multi-query attention", "sliding window attention", "batching", "admission control",
)  # fmt: skip

_CACHE = (
    " the memory that holds the attention keys and values of all tokens that were already computed, so that each "
    "new token only needs one pass over itself."
)
_SHARED = (
    " a way to let sequences share a block until one of them has to write to it. Only then that block is copied, "
    "and the writer goes on with its own copy."
)
_SERVING = (
    " the work of running a language model for many requests at once. The hard parts are memory for the KV cache, "
    "batching, and short waiting times."
)
_PAGED = (
    " a way to keep the keys and values of a sequence in fixed-size blocks that may lie anywhere in memory. A block "
    "table maps each position of the sequence to its block, like the page table of an operating system."
)
_KVPAGE = (
    " an LLM serving engine that is a Python library. It gives your own program paged KV memory, continuous "
    "batching, prefix caching and streaming, without a server or a second process."
)
_WIDE_FIELD = " a wide field, and I know only a little corner of it: LLM serving."
_PREDICTOR = (
    " a program that predicts the next token of a text. Repeating this prediction gives answers, programs or "
    "stories."
)
_NOT_KNOWN = " not known to me: I am a small demo model for LLM serving."

_OPENINGS = (
    ("Paged attention is", _PAGED), ("PagedAttention is", _PAGED), ("PagedAttention", f" is{_PAGED}"),
    ("kvpage is", _KVPAGE), ("kvpage is", _KVPAGE), ("kvpage", f" is{_KVPAGE}"),
    ("A KV cache is", _CACHE), ("The KV cache is", _CACHE), ("KV cache is", _CACHE),
    ("Copy-on-write is", _SHARED), ("Copy on write is", _SHARED),
    ("LLM serving is", _SERVING), ("LLM inference is", _SERVING), ("Model serving is", _SERVING),
    ("A large language model is", _PREDICTOR), ("An LLM is", _PREDICTOR), ("A language model is", _PREDICTOR),
    (
        "vLLM is",
        " a large serving system that runs its core in a process of its own. kvpage is a library that runs "
        "inside your process, with small parts that plugins can replace.",
    ),
    ("The block table is", " a list of block numbers, one list per sequence."),
    (
        "The scheduler is",
        " the part of kvpage that decides at every step which sequences run and how many tokens each may compute.",
    ),
    ("A tokenizer is", " a program that turns text into token ids and back."),
    ("Temperature is", " a number that divides the logits before sampling."),
    ("Attention is", " a way to let each token look at the tokens before it."),
    ("A GPU is", " a processor with far more arithmetic and memory bandwidth than a CPU."),
    (
        "In kvpage,",
        " the scheduler makes a plan, the model runs it, and the results are committed. There is no separate "
        "prefill phase; every sequence just catches up with its known tokens.",
    ),
    (
        "With kvpage,",
        " your own program gets paged KV memory, continuous batching, prefix caching and streaming, without a "
        "server or a second process.",
    ),
    ("kvpage can", " run on a CPU or a GPU, stream its output, and host several engines in one process."),
    ("kvpage runs", " inside your process and leaves it as it was."),
    ("To install kvpage,", " run pip install kvpage."),
    ("Hello", "! I am the kvpage demo model. Ask me about paged attention, batching or kvpage."),
    ("Hi", "! I am the kvpage demo model. Ask me about paged attention, batching or kvpage."),
    ("I am", " the kvpage demo model, a very small language model that ships with kvpage."),
    ("The meaning of life is", _NOT_KNOWN), ("The weather today is", _NOT_KNOWN),
    ("The best programming language is", _NOT_KNOWN), ("The largest planet is", _NOT_KNOWN),
    ("Artificial intelligence is", _WIDE_FIELD), ("AI is", _WIDE_FIELD), ("Machine learning is", _WIDE_FIELD),
    ("Python is", " the language that kvpage is written in."),
    (
        "A plugin is",
        " a small package that adds a part to kvpage: an attention backend, a decoder, a quantization format, a "
        "model family, a sampler or a command.",
    ),
    ("The engine", " makes a plan at every step, runs the model once, and commits the results."),
    ("To be or not to be", ", that is the question. I know more about paged attention."),
    ("Roses are red", ", violets are blue, the cache keeps the keys, and the values too."),
)  # fmt: skip


@cache
def _facts_by_key() -> dict[str, Fact]:
    return {fact.key: fact for fact in load_facts()}


@cache
def other_words() -> tuple[tuple[str, str], ...]:
    """Return the further questions and their answers."""
    answers = {text: _facts_by_key()[key].answer for key, text in _OTHER_WORDS.items()}
    answers[_NEEDS_GPU] = _NEEDS_NO_GPU
    return tuple((question, answer) for text, answer in answers.items() for question in text.split("|"))


@cache
def _technique_openings() -> tuple[tuple[str, str], ...]:
    facts = [_facts_by_key()[f"define:{name}"] for name in _TECHNIQUES]
    names = [fact.names[0][0].upper() + fact.names[0][1:] for fact in facts]
    return tuple(
        (f"{name} is", f" a technique that{fact.answer.removeprefix(name)}")
        for name, fact in zip(names, facts, strict=True)
    )


def _typed(random_: random.Random, question: str) -> str:
    """Return the question in one of the ways in which it is typed: case and the last sign are free."""
    if random_.random() < 0.3:
        question = question.rstrip("?.!") or question
    draw = random_.random()
    if draw < 0.35:
        return question.lower()
    return (
        question[0].upper() + question[1:] if draw < 0.7 and not question.startswith("kvpage") else question
    )


def _plain_question(random_: random.Random, kinds: tuple[str, ...] = ()) -> tuple[str, str]:
    """A fact asked in the plainest way of its kind, which no fact holds back."""
    fact = random_.choice([fact for fact in load_facts() if not kinds or fact.kind in kinds])
    question = random_.choice(questions(fact, TEMPLATES[fact.kind][:1]))
    return _typed(random_, question), fact.answer


def _strange(random_: random.Random) -> tuple[str, str]:
    if random_.random() < 0.7:
        return _typed(random_, random_.choice(_STRANGE)), UNKNOWN
    return "".join(random_.choices(string.ascii_lowercase, k=random_.randint(3, 9))), UNKNOWN


def first_turn(random_: random.Random) -> tuple[str, str]:
    """Return a question that people ask first, and its answer."""
    draw = random_.random()
    if draw < 0.20:
        return _plain_question(random_, ("say", "ask"))
    if draw < 0.38:
        question, answer = random_.choice(other_words())
        return _typed(random_, question), answer
    if draw < 0.62:
        return _plain_question(random_)
    if draw < 0.90:
        problem = arithmetic.draw_close(random_)
        return arithmetic.phrase(random_, problem), problem.answer
    if draw < 0.94:
        return round_numbers(random_)
    return _strange(random_) if draw < 0.97 else outside(random_)


def first_opening(random_: random.Random) -> tuple[str, str]:
    """Return first words of a plain text and what follows them."""
    draw = random_.random()
    if draw < 0.45:
        return random_.choice(_OPENINGS)
    if draw < 0.65:
        return random_.choice(_technique_openings())
    fact = random_.choice([fact for fact in load_facts() if fact.kind == "define"])
    words = fact.answer.split(" ")
    count = random_.randint(2, 4)
    return " ".join(words[:count]), " " + " ".join(words[count:])
