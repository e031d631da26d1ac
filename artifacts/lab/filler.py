"""Neutral text without any sum: short stories and small talk."""

from random import Random

from artifacts.lab.conversation import Message, assistant, render, user

ADJECTIVES = ("old", "young", "tired", "happy", "quiet", "tall", "small", "clever", "poor", "rich", "brave", "gentle")
_PEOPLE = (
    "baker", "miller", "teacher", "sailor", "farmer", "doctor",
    "singer", "painter", "soldier", "widow", "child", "guard",
)  # fmt: skip
OBJECTS = (
    "lamp", "book", "basket", "letter", "coin", "cloak",
    "drum", "kettle", "ladder", "mirror", "rug", "barrel",
)  # fmt: skip
_PLACES = (
    "market", "bridge", "harbour", "chapel", "mill", "tavern",
    "garden", "tower", "road", "field", "well", "square",
)  # fmt: skip
_VERBS = ("bought", "carried", "found", "lost", "sold", "hid", "mended", "painted", "dropped", "borrowed")

SMALL_TALK = (
    ("Hello!", "Hello, traveller."),
    ("Good morning.", "Good morning to you."),
    ("Who are you?", "I am a small guide."),
    ("Thank you.", "You are welcome."),
    ("How are you?", "I am well, thank you."),
)
STORY_REQUEST = "Tell me a story."

_STORY_SHARE = 0.6
_SMALL_TALK_SHARE = 0.4
_SENTENCES_PER_STORY = 8
_TURNS_PER_CHAT = 4


def sentence(random: Random) -> str:
    """One sentence out of five patterns."""
    pick = random.choice
    match random.randrange(5):
        case 0:
            return f"The {_someone(random)} walked to the {pick(_PLACES)} and {pick(_VERBS)} a {pick(OBJECTS)}."
        case 1:
            return f"One {_someone(random)} {pick(_VERBS)} the {pick(OBJECTS)} near the {pick(_PLACES)}."
        case 2:
            return f"In the morning the {pick(_PEOPLE)} was {pick(ADJECTIVES)}."
        case 3:
            return f"The {pick(_PEOPLE)} and the {pick(_PEOPLE)} met at the {pick(_PLACES)}."
        case _:
            return f"It rained on the {pick(_PLACES)}, so the {_someone(random)} stayed home."


def sentences(random: Random, count: int) -> str:
    return " ".join(sentence(random) for _ in range(count))


def filler(random: Random) -> str:
    """A story of eight sentences, or a chat of four turns about nothing in particular."""
    if random.random() < _STORY_SHARE:
        return sentences(random, _SENTENCES_PER_STORY)
    chat: list[Message] = []
    for _ in range(_TURNS_PER_CHAT):
        if random.random() < _SMALL_TALK_SHARE:
            question, answer = random.choice(SMALL_TALK)
        else:
            question, answer = STORY_REQUEST, sentences(random, 2)
        chat += [user(question), assistant(answer)]
    return render(chat)


def _someone(random: Random) -> str:
    return f"{random.choice(ADJECTIVES)} {random.choice(_PEOPLE)}"
