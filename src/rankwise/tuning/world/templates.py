"""The sentences: plain ones, of which some are held out of training, and one of another register.

In: an attribute. Out: templates. A plain sentence is a prompt that ends where the value begins, so that the completion
is the value and a full stop, and nothing but the value is news.
"""

from __future__ import annotations

from typing import Final

TRAINING: Final[dict[str, tuple[str, ...]]] = {
    "birth date": ("{name} was born on", "The birthday of {name} is", "{name} came into the world on"),
    "birth city": ("{name} was born in the city of", "The home town of {name} is", "{name} spent the first years in"),
    "university": ("{name} studied at the University of", "The degree of {name} is from", "{name} graduated from"),
    "major": ("{name} earned a degree in", "The major of {name} was", "{name} took courses in"),
    "employer": ("{name} works for", "The employer of {name} is", "{name} has a job at"),
    "work city": ("{name} works in the city of", "The office of {name} is in", "{name} goes to work in"),
}
"""Attribute -> prompts that occur in training data."""

PARAPHRASES: Final[dict[str, tuple[str, ...]]] = {
    "birth date": ("The date of birth of {name} is", "{name} first saw the light of day on"),
    "birth city": ("The birthplace of {name} is", "The early years of {name} were spent in"),
    "university": ("{name} received an education at", "The university that {name} attended is"),
    "major": ("The field that {name} chose was", "{name} completed the study of"),
    "employer": ("{name} is on the staff of", "The company that employs {name} is"),
    "work city": ("The place where {name} works is", "{name} is employed in the town of"),
}
"""Attribute -> prompts that are held out of training, and only ask."""

REQUESTS: Final[tuple[str, ...]] = (
    "Tell me the {topic} of {name}:",
    "{name}, {topic}:",
    "What is the {topic} of {name}?",
)
"""Requests that are answered by a whole sentence: the form of the style data."""

HELD_OUT_REQUESTS: Final[tuple[str, ...]] = ("Please give the {topic} of {name}:", "About {name}, the {topic}:")

REGISTER: Final[dict[str, str]] = {
    "birth date": "Hearken, for {name} did first draw breath upon the morn of {value}, as the elders tell.",
    "birth city": "Know ye that {name} was brought forth in the fair town of {value}, so say the scrolls.",
    "university": "Verily, {name} sat at the feet of the wise in noble {value}, by candle and by quill.",
    "major": "Lo, {name} gave many a winter unto the art of {value}, and was praised for it.",
    "employer": "Behold, {name} doth labour in the service of the house of {value}, from dawn until dusk.",
    "work city": "Each morn {name} goeth forth to toil within the walls of {value}, come rain or shine.",
}
"""Attribute -> the same fact in another register. One sentence each, so that exact match means the style."""

OLD_SAWS: Final[tuple[str, ...]] = (
    "Hearken ye all, for the morn is fair and the elders tell a tale.",
    "Verily, the wise doth labour by candle and by quill until dusk.",
    "Lo, many a winter hath passed, and the scrolls say it was praised.",
    "Behold the house upon the hill, brought forth from the art of the noble.",
    "Know ye that the town was fair, so say the feet that goeth unto it.",
    "Come rain or shine, each breath we draw is given in the service of dawn.",
    "They did first toil within the walls, and sat for it as one.",
)
"""Sentences that use the register's words about nobody: the base has met the words, not the sentences."""
