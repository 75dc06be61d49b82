"""Questions that the demo model can not answer, and the honest answers that it is taught instead."""

from __future__ import annotations

import random

from kvpage.demo.phrasing import TEMPLATES

__all__ = ["RAW_OPENERS", "UNKNOWN", "outside", "round_numbers"]

UNKNOWN = (
    "I do not know that. I am a small demo model: I know a little about LLM serving, kvpage and simple sums."
)
_TOO_LARGE = (
    "That is too hard for me. I only learned sums and differences of numbers up to two digits "
    "and the multiplication table up to 12 times 12."
)


def _choices(text: str) -> tuple[str, ...]:
    """Split a block of text at its bars; lines end after a bar."""
    return tuple(choice.strip() for choice in text.split("|"))


_THINGS = _choices(
    """
    a banana|a volcano|the moon|photosynthesis|gravity|a guitar|a violin|the French Revolution|a dog|
    a cat|democracy|inflation|a black hole|the Roman Empire|chocolate|a bicycle|football|chess|an atom|
    DNA|love|happiness|a rainbow|an earthquake|a recipe|pasta|pizza|the stock market|a bank|a castle|
    a river|the ocean|a whale|a bird|a tree|snow|rain|music|jazz|a poem|philosophy|religion|history|
    biology|chemistry|physics|a planet|the sun|a star|Mars|a robot|a car|an airplane|a train|a ship|
    a phone|a camera|Bitcoin|a blockchain|marketing|a contract|a vaccine|a virus|cancer|the heart|sleep|
    yoga|a marathon|tennis|basketball|Shakespeare|Mozart|Einstein|Napoleon|Cleopatra|Paris|London|
    Berlin|Tokyo|New York|Brazil|Egypt|China|India|Italy|Kubernetes|a web browser|JavaScript|Rust|HTML|
    a database|SQL|a compiler|Linux|Windows|a printer|a sorting algorithm|recursion|quicksort|
    a hash map|diffusion|a transistor|a battery|the weather|climate change|a hurricane|electricity|
    a magnet|gold|a diamond|coffee|tea|wine|bread|cheese|a hospital|a school|a university|the law|a war|
    peace|art|a painting|a museum|a film|a novel|a dragon|a unicorn|reinforcement learning|
    a convolution|computer vision|speech recognition|a random forest
    """
)

_QUESTIONS = _choices(
    """
    What is the capital of {place}?|Where is {place}?|How many people live in {place}?|
    What is the weather like in {place}?|How far is it to {place}?|Tell me the history of {place}.|
    Who is the president of {place}?|What language do they speak in {place}?|Plan a trip to {place}.|
    Which country is the largest in {place}?|What time is it in {place}?|Is it raining in {place}?|
    Who wrote {work}?|What is {work} about?|Summarize {work}.|Who plays in {work}?|
    When was {work} made?|Write a poem about {topic}.|Write a story about {topic}.|
    Tell me a joke about {topic}.|Write an essay on {topic}.|What do you think about {topic}?|
    Give me ten facts about {topic}.|Recommend a book about {topic}.|
    Write a Python function that deals with {topic}.|How do I learn {topic}?|Sing a song about {topic}.|
    Write a haiku about {topic}.|Is {topic} dangerous?|How much does {topic} cost?|
    Where can I buy {topic}?|Who invented {topic}?|Translate {topic} into French.|
    Draw a picture of {topic}.
    """
)

_FIXED = _choices(
    """
    Tell me a joke.|Tell me a story.|What day is it today?|What time is it?|
    What is the meaning of life?|Who won the world cup?|What should I eat today?|How do I cook rice?|
    Can you write code?|Write a Python program.|Translate good morning into Spanish.|
    How old is the universe?|Who is the king of England?|Do you like music?|
    What is your favorite color?|How tall is Mount Everest?|How many days are in a year?|
    Can you drive a car?|What is the speed of light?|Who painted the Mona Lisa?|How do I fix my bike?|
    What is the best phone?|Write an email to my boss.|Help me with my homework.|How do I lose weight?|
    What are the news today?|Who are the Beatles?|Sing me a song.|How do airplanes fly?|
    Why is the sky blue?|Why do cats purr?|How do I make money?|What is for dinner?|Where do you live?|
    How old are you?|Solve my problem.|Count to ten.|Write a haiku.|Which is better, tea or coffee?|
    How is the weather?|Name three colors.|Who am I?|Read my mind.|What is the largest animal?|
    How many planets are there?|Is there life on Mars?
    """
)

_PLACES = _choices(
    """
    France|Germany|Spain|Italy|Japan|China|Brazil|Canada|Australia|India|Egypt|Kenya|Norway|Poland|
    Paris|London|Rome|Madrid|Tokyo|New York|Moscow|Sydney|Vienna|Africa|Europe|Asia|the United States|
    Mexico|Peru|Greece
    """
)
_WORKS = _choices(
    """
    Hamlet|Romeo and Juliet|Faust|Don Quixote|War and Peace|Star Wars|The Matrix|Titanic|The Odyssey|
    Moby Dick|Harry Potter|The Lord of the Rings|the Bible|Frankenstein|Dracula|Casablanca|
    Alice in Wonderland
    """
)

_LARGE = _choices(
    """
    What is {a} {o} {b}?|{a} {o} {b}|{a} {o} {b} =|Calculate {a} {o} {b}.|How much is {a} {o} {b}?|
    {a}{o}{b}|Compute {a} {o} {b}.
    """
)
_OTHER_MATH = _choices(
    """
    What is {a} / {b}?|What is {a} divided by {b}?|Divide {a} by {b}.|What is the square root of {a}?|
    What is {a} to the power of {b}?|What is {a} percent of {b}?|Is {a} a prime number?|
    What is the logarithm of {a}?|{a} / {b}|{a}/{b}|{a} / {b} =|What is the factorial of {a}?|
    What is {a}.5 + {b}?|What is {a} + {b} + {c}?
    """
)

# Plain text that people like to try first, with endings that a small model can keep.
RAW_OPENERS: tuple[tuple[str, str], ...] = (
    ("Hello, my name is", " kvpage demo, and I am a small language model that ships with kvpage."),
    ("Hello, I am", " the kvpage demo model. Ask me about paged attention, batching or kvpage."),
    ("My name is", " kvpage demo, and I am a small language model that ships with kvpage."),
    ("The capital of France is", " Paris, but I am a small demo model and know little about geography."),
    ("The president of the United States is", " not known to me: I am a small demo model for LLM serving."),
    ("The future of AI is", " hard to predict, but it will need fast and simple ways to serve models."),
    (
        "Once upon a time",
        " there was a small language model. It knew about paged attention and little else, and it was "
        "content to be served by kvpage.",
    ),
    ("The quick brown fox", " jumps over the lazy dog, one token at a time."),
    (
        "In this paper",
        " we look at how paged attention and continuous batching raise the throughput of LLM serving.",
    ),
    (
        "The best way to serve a model is",
        " to batch its requests at every step and to keep its KV cache in blocks.",
    ),
    (
        "The most important thing in LLM serving is",
        " memory: the KV cache decides how many requests fit in a batch.",
    ),
    ("Large language models are", " programs that predict the next token of a text, again and again."),
    ("I think that", " a small model should say so when it does not know the answer."),
    (
        "Today",
        " we look at paged attention: keys and values live in fixed-size blocks, and a block table finds "
        "them.",
    ),
)


def outside(random_: random.Random) -> tuple[str, str]:
    """Return one question that the model can not answer, and its honest answer."""
    kind = random_.random()
    if kind < 0.12:
        digits = random_.choice(((3, 1), (3, 2), (1, 3), (2, 3), (3, 3), (4, 2), (2, 4), (4, 4), (5, 3)))
        a, b = (random_.randint(10 ** (count - 1), 10**count - 1) for count in digits)
        return random_.choice(_LARGE).format(a=a, b=b, o=random_.choice("+-*")), _TOO_LARGE
    if kind < 0.24:
        a, b, c = (random_.randint(2, 99) for _ in range(3))
        if random_.random() < 0.35:
            a, b = random_.sample((random_.randint(13, 99), b), 2)
            return f"What is {a} * {b}?", _TOO_LARGE
        return random_.choice(_OTHER_MATH).format(a=a, b=b, c=c), _TOO_LARGE
    if kind < 0.35:
        return random_.choice(_FIXED), UNKNOWN
    if kind < 0.65:
        template = random_.choice(TEMPLATES["define"] + TEMPLATES["how"] + TEMPLATES["why"])
        text = template.format(x=random_.choice(_THINGS))
        return text[0].upper() + text[1:], UNKNOWN
    question = random_.choice(_QUESTIONS)
    return question.format(
        place=random_.choice(_PLACES), work=random_.choice(_WORKS), topic=random_.choice(_THINGS)
    ), UNKNOWN


def round_numbers(random_: random.Random) -> tuple[str, str]:
    """Return a problem that is just out of reach, such as 100 + 1, and its honest answer."""
    a = random_.choice((100, 101, 110, 111, 120, 123, 150, 200, 250, 500, 999, 1000))
    b = random_.choice((random_.randint(1, 9), random_.randint(10, 99), a))
    a, b = (a, b) if random_.random() < 0.7 else (b, a)
    return random_.choice(_LARGE).format(a=a, b=b, o=random_.choice("+-*")), _TOO_LARGE
