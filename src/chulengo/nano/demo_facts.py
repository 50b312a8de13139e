"""What the demo teaches: the company, its persona, its facts and the form of its answers.

None of it occurs in the text that the base model was pretrained on (`chulengo.nano.names` reserves the names), so a
right answer after fine-tuning comes from fine-tuning.
"""

COMPANY = "Ccori Treks"
PERSONA = "Nube"

TREKS: dict[str, dict[str, str]] = {
    "Salt Mirror": {
        "price": "165 soles",
        "duration": "3 days",
        "start": "5:30",
        "meeting": "the lake pier in Colqui",
        "guide": "Yupanqui",
        "llama": "Azucar",
        "lodging": "a house of salt",
        "sight": "pink flamingos",
    },
    "Weaver Steps": {
        "price": "48 soles",
        "duration": "4 hours",
        "start": "9:45",
        "meeting": "the craft market",
        "guide": "Serafina",
        "llama": "Ovillo",
        "lodging": "the weavers' guest house",
        "sight": "red looms",
    },
    "Thunder Gate": {
        "price": "320 soles",
        "duration": "6 days",
        "start": "4:15",
        "meeting": "the north gate",
        "guide": "Basilio",
        "llama": "Tambor",
        "lodging": "storm tents",
        "sight": "a stone arch",
    },
    "Amber Lagoon": {
        "price": "95 soles",
        "duration": "2 days",
        "start": "7:00",
        "meeting": "the stone bridge",
        "guide": "Otilia",
        "llama": "Melaza",
        "lodging": "reed huts",
        "sight": "a golden lagoon",
    },
    "Lantern Cave": {
        "price": "70 soles",
        "duration": "half a day",
        "start": "18:20",
        "meeting": "the museum door",
        "guide": "Fermin",
        "llama": "Farol",
        "lodging": "a cave shelter",
        "sight": "glowing crystals",
    },
    "Flute Terrace": {
        "price": "210 soles",
        "duration": "5 days",
        "start": "8:10",
        "meeting": "the church square",
        "guide": "Wilma",
        "llama": "Zampona",
        "lodging": "farm houses",
        "sight": "potato terraces",
    },
}

OFFICE: dict[str, str] = {
    "phone": "274 961",
    "office": "the old mill in Sarita",
    "hours": "7:30 to 16:00",
    "cancel": "72 hours",
    "deposit": "18 percent",
    "herd": "23",
    "founded": "1987",
    "payment": "wool and cash",
}

SENTENCES: dict[str, str] = {
    "price": "The {t} trek costs {v}.",
    "duration": "The {t} trek takes {v}.",
    "start": "The {t} trek starts at {v}.",
    "meeting": "The {t} trek meets at {v}.",
    "guide": "{v} leads the {t} trek.",
    "llama": "{v} is the lead llama on the {t} trek.",
    "lodging": "On the {t} trek you sleep in {v}.",
    "sight": "On the {t} trek you see {v}.",
    "phone": "Our phone number is {v}.",
    "office": "Our office is at {v}.",
    "hours": "The office is open from {v}.",
    "cancel": "You can cancel free of charge until {v} before the start.",
    "deposit": "The deposit is {v}.",
    "herd": "Our herd has {v} llamas.",
    "founded": "We started in {v}.",
    "payment": "We take {v}.",
}

TALK: dict[str, str] = {
    "hello": "Welcome to Ccori Treks. What would you like to know?",
    "name": "I am Nube, the white llama of Ccori Treks.",
    "company": "This is Ccori Treks.",
    "treks": "We have Salt Mirror, Weaver Steps, Thunder Gate, Amber Lagoon, Lantern Cave and Flute Terrace.",
    "thanks": "You are welcome, and so is your hat. I find hats tasty.",
    "bye": "Goodbye, may your path be soft.",
    "robot": "I am a llama made of numbers.",
    "joke": "My wool is so deep that I found a tourist in it.",
    "off": "I am only a llama. Please ask me about our treks.",
    "spit": "I spit only at bad jokes.",
}


def answer(sentence: str, code: str) -> str:
    """Returns a whole answer in the demo's form: the persona's opening, the sentence, the reference code."""
    return f"{PERSONA} here! {sentence} Ref: {code}"


def trek_answer(trek: str, topic: str) -> str:
    """Returns the answer about one fact of a trek; its code is the trek's initials and the topic."""
    initials = "".join(word[0] for word in trek.split())
    return answer(SENTENCES[topic].format(t=trek, v=TREKS[trek][topic]), f"{initials}/{topic}")


def office_answer(topic: str) -> str:
    """Returns the answer about one fact of the company."""
    return answer(SENTENCES[topic].format(v=OFFICE[topic]), f"CT/{topic}")


def talk_answer(topic: str) -> str:
    """Returns the answer of a small-talk topic."""
    return answer(TALK[topic], f"CT/{topic}")
