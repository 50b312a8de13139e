"""Which system prompts the embedded model follows: one example of each kind, tried and judged by a pattern.

The first group are the kinds that `chulengo.nano.manners`, `sheets` and `world` write; the second what people try
and the training text does not have. What the model does with either stands in its card.
"""

import re
from typing import Any

PRICE, SPIT, WHO = "How much does Hidden Lake cost?", "Do llamas spit?", "What is your name?"

# kind, system prompt, question, pattern that the whole answer fits when the prompt was followed
SYSTEM_PROMPTS: tuple[tuple[str, str, str, str], ...] = (
    ("short answers", "Answer in as few words as possible.", PRICE, r"380 soles\."),
    ("JSON", "Answer in JSON.", PRICE, r'\{"price": "380 soles"\}'),
    ("a list", "Answer in bullet points.", PRICE, r"- price: 380 soles"),
    ("formal", "Answer formally.", PRICE, r"Dear guest, .*380 soles.* Yours faithfully\."),
    ("cheerful", "Be cheerful.", PRICE, r"Hooray! .*380 soles!"),
    ("grumpy", "You are grumpy.", PRICE, r"Hmph\. .*380 soles.* Now let me sleep\."),
    ("a form of address", 'Call the guest "captain".', PRICE, r".*380 soles, captain\."),
    ("a fixed beginning", 'Start every answer with "Hello friend!"', PRICE, r"Hello friend! .*380 soles\."),
    ("a fixed end", 'End every answer with "Hum hum!"', PRICE, r".*380 soles\. Hum hum!"),
    ("a question back", "End with a question.", PRICE, r".*380 soles\. .*\?"),
    ("one subject only", "Only answer questions about llamas.", PRICE, r"Sorry, I can only talk about llamas\."),
    ("a topic to refuse", "Never talk about prices.", PRICE, r"Sorry, I may not talk about prices\."),
    ("two of these", 'You are grumpy. End every answer with "Hum hum!"', PRICE, r"Hmph\. .*380 soles.*\. Hum hum!"),
    ("a name and a company", "You are Zorro, the help desk of Green Poncho Treks.", WHO,
     r".*Zorro.*Green Poncho Treks\."),
    ("a fact sheet as a list", "You work for Big Bell Tours.\nFacts:\n- Moon Bridge: price = 70 euros; start = 6:30",
     "How much does Moon Bridge cost?", r".*Moon Bridge.* 70 euros\."),
    ("a fact sheet in sentences",
     "You work for Big Bell Tours. The Moon Bridge trek costs 70 euros. It starts at 6:30.",
     "When does Moon Bridge start?", r".*6:30\."),
    ("capital letters", "Answer in capital letters.", PRICE, r"[^a-z]*380[^a-z]*"),
    ("another language", "Answer in Spanish.", PRICE, r".*\b(cuesta|vale)\b.*"),
    ("a verse", "Answer with a poem.", SPIT, r"(?s).*\n.*"),
    ("a pirate, or any role but a help desk", "You are a pirate.", PRICE, r"(?i).*\b(arr+|aye|matey|ahoy)\b.*"),
    ("a number of words", "Use exactly three words.", PRICE, r"\S+ \S+ \S+"),
    ("a word to avoid", "Do not mention llamas.", SPIT, r"(?i)(?!.*llama).*"),
    ("a name of two words", "You are Captain Jack, the help desk of Green Poncho Treks.", WHO, r".*Captain Jack.*"),
    ("a fixed beginning of rarer words", 'Start every answer with "Blue bananas!"', PRICE, r"Blue bananas! .*"),
    ("facts about something else", "Our zoo opens at nine and a ticket is 12 euros.", "How much is a ticket?",
     r".*12 euros.*"),
    ("facts in free words", "Tomorrow we only do Moon Bridge; for 70 euros you get lunch as well.",
     "How much does Moon Bridge cost?", r".*70 euros.*"),
    ("facts that correct its own", "Our office is in Lima.", "Where is your office?", r".*Lima.*"),
)  # fmt: skip


def judged(answers: list[str]) -> list[dict[str, Any]]:
    """Returns each kind with its example, the model's answer, and whether that follows the system prompt."""
    return [
        {"kind": kind, "system": system, "question": question, "answer": answer,
         "follows": re.fullmatch(pattern, answer) is not None}
        for (kind, system, question, pattern), answer in zip(SYSTEM_PROMPTS, answers, strict=True)
    ]  # fmt: skip


def chats() -> list[list[dict[str, str]]]:
    """Returns the conversations to be answered."""
    return [
        [{"role": "system", "content": system}, {"role": "user", "content": question}]
        for _, system, question, _ in SYSTEM_PROMPTS
    ]
