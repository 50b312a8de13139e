"""How guests ask in the demo: for each topic the wordings of training, and others that only the held-out set uses.

Patterns as in `chulengo.nano.patterns`; ``{t}`` is the trek. A wording of one side never occurs on the other.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Wordings:
    """The wordings of one topic.

    Attributes:
        asks: Questions in the training set that name the trek.
        follows: Questions in the training set that leave it out.
        heldout_asks: Other questions that name it, for the held-out set.
        heldout_follows: Other questions that leave it out, for the held-out set.
    """

    asks: tuple[str, ...]
    heldout_asks: tuple[str, ...]
    follows: tuple[str, ...] = ()
    heldout_follows: tuple[str, ...] = ()


TREK_WORDINGS: dict[str, Wordings] = {
    "price": Wordings(
        asks=(
            "How much does {t} cost?",
            "What is the price of {t}?",
            "How much is {t} per person?",
            "What do you charge for {t}?",
            "Can you tell me the price of {t}?",
            "How much money do I need for {t}?",
            "How expensive is {t}?",
            "I would like to know the price of {t}.",
        ),
        follows=("And how much does it cost?", "And the price?", "How much is it?"),
        heldout_asks=(
            "What do we have to pay for {t}?",
            "What would {t} cost us?",
            "Could you give me the cost of {t}?",
            "How much should I budget for {t}?",
        ),
        heldout_follows=("And what do we pay?", "What does that one cost?"),
    ),
    "duration": Wordings(
        asks=(
            "How long does {t} take?",
            "How long is {t}?",
            "What is the duration of {t}?",
            "How much time do we need for {t}?",
            "Can you tell me how long {t} takes?",
            "For how long do we walk on {t}?",
            "How long will I be away on {t}?",
            "I would like to know how long {t} is.",
        ),
        follows=("And how long is it?", "And the duration?", "How long does it take?"),
        heldout_asks=(
            "How much time does {t} take?",
            "How long does {t} last?",
            "How much time should I plan for {t}?",
            "Could you tell me the duration of {t}?",
        ),
        heldout_follows=("And how much time do we need?", "And how long does that take?"),
    ),
    "start": Wordings(
        asks=(
            "When does {t} start?",
            "At what time does {t} start?",
            "What is the start time of {t}?",
            "What time does {t} leave?",
            "Can you tell me when {t} starts?",
            "How early does {t} begin?",
            "What time should we be there for {t}?",
            "I would like to know when {t} starts.",
        ),
        follows=("And when does it start?", "And the start time?", "At what time?"),
        heldout_asks=(
            "What time does {t} begin?",
            "At what hour do we set off for {t}?",
            "When do I have to be ready for {t}?",
            "Could you give me the start time of {t}?",
        ),
        heldout_follows=("And what time does it begin?", "And when do we set off?"),
    ),
    "meeting": Wordings(
        asks=(
            "Where do we meet for {t}?",
            "Where does {t} start from?",
            "What is the meeting point for {t}?",
            "Where should I go for {t}?",
            "Can you tell me where we meet for {t}?",
            "Where do I find you for {t}?",
            "Where does the group meet for {t}?",
            "I would like to know the meeting place of {t}.",
        ),
        follows=("And where do we meet?", "And the meeting point?", "Where should we go?"),
        heldout_asks=(
            "Which place do we meet at for {t}?",
            "Where do you pick us up for {t}?",
            "Where must we come for {t}?",
            "Could you tell me the meeting point of {t}?",
        ),
        heldout_follows=("And where is the meeting place?", "Where do I come?"),
    ),
    "guide": Wordings(
        asks=(
            "Who leads {t}?",
            "Who is the guide on {t}?",
            "Which guide goes on {t}?",
            "What is the name of the guide on {t}?",
            "Can you tell me who guides {t}?",
            "Who walks with us on {t}?",
            "Who is in charge of {t}?",
            "I would like to know the guide of {t}.",
        ),
        follows=("And who leads it?", "And the guide?", "Who guides it?"),
        heldout_asks=(
            "Who will show us the way on {t}?",
            "With which guide do we walk on {t}?",
            "Who takes us on {t}?",
            "Could you tell me the name of the guide for {t}?",
        ),
        heldout_follows=("And who is the guide?", "Who walks with us?"),
    ),
    "llama": Wordings(
        asks=(
            "Which llama leads {t}?",
            "Who is the lead llama on {t}?",
            "What is the lead llama of {t} called?",
            "Which llama walks in front on {t}?",
            "Can you tell me which llama goes on {t}?",
            "Which of your llamas comes along on {t}?",
            "What is the name of the lead llama on {t}?",
            "I would like to know the lead llama of {t}.",
        ),
        follows=("And which llama comes along?", "And the lead llama?", "Which llama leads it?"),
        heldout_asks=(
            "Which llama will we meet on {t}?",
            "Which animal walks first on {t}?",
            "Could you tell me the name of the llama on {t}?",
            "Which llama goes first on {t}?",
        ),
        heldout_follows=("And which llama goes first?", "Who is the lead llama?"),
    ),
    "lodging": Wordings(
        asks=(
            "Where do we sleep on {t}?",
            "What is the lodging on {t}?",
            "Where do the guests sleep on {t}?",
            "In what do we sleep on {t}?",
            "Can you tell me where we sleep on {t}?",
            "What kind of beds do we get on {t}?",
            "Where will I spend the night on {t}?",
            "I would like to know the lodging of {t}.",
        ),
        follows=("And where do we sleep?", "And the lodging?", "Where do we spend the night?"),
        heldout_asks=(
            "Where do we stay at night on {t}?",
            "What kind of lodging is there on {t}?",
            "Where will we sleep on {t}?",
            "Could you tell me where the nights are on {t}?",
        ),
        heldout_follows=("And where do we stay at night?", "And what about the nights?"),
    ),
    "sight": Wordings(
        asks=(
            "What do we see on {t}?",
            "What is the highlight of {t}?",
            "What is special about {t}?",
            "What is there to see on {t}?",
            "Can you tell me the highlight of {t}?",
            "What can I see on {t}?",
            "Which sights are on {t}?",
            "I would like to know what we see on {t}.",
        ),
        follows=("And what do we see?", "And the highlight?", "What is there to see?"),
        heldout_asks=(
            "What will we see on {t}?",
            "What is the best view of {t}?",
            "What is interesting about {t}?",
            "Could you tell me what there is to see on {t}?",
        ),
        heldout_follows=("And what is special about it?", "And what can we see?"),
    ),
}

OFFICE_WORDINGS: dict[str, Wordings] = {
    "phone": Wordings(
        asks=(
            "What is your phone number?",
            "How can I call you?",
            "Can you give me your phone number?",
            "Which number do I call?",
            "Do you have a phone?",
            "I would like to call you.",
        ),
        heldout_asks=("Under which number can I reach you?",),
    ),
    "office": Wordings(
        asks=(
            "Where is your office?",
            "What is your address?",
            "Where can I find your office?",
            "How do we find you?",
            "Can you tell me where your office is?",
            "Where are you?",
        ),
        heldout_asks=("In which place is the office?",),
    ),
    "hours": Wordings(
        asks=(
            "When is your office open?",
            "What are your opening hours?",
            "When are you open?",
            "At what time does the office close?",
            "Can you tell me your office hours?",
            "From when to when is the office open?",
        ),
        heldout_asks=("How long is the office open?",),
    ),
    "cancel": Wordings(
        asks=(
            "Can I cancel?",
            "What is your cancellation policy?",
            "Until when can we cancel?",
            "How late can I cancel for free?",
            "What happens if we cancel?",
            "May we cancel our booking?",
        ),
        heldout_asks=("What is the rule if I cannot come?",),
    ),
    "deposit": Wordings(
        asks=(
            "How much is the deposit?",
            "Do I pay a deposit?",
            "What is the deposit?",
            "Is there a deposit?",
            "What part do we pay in advance?",
            "Must I pay something in advance?",
        ),
        heldout_asks=("How much must be paid before the trek?",),
    ),
    "herd": Wordings(
        asks=(
            "How many llamas do you have?",
            "How big is your herd?",
            "What is the size of your herd?",
            "Do you have many llamas?",
            "Can you tell me how many llamas you have?",
            "How large is the herd?",
        ),
        heldout_asks=("How many animals live with you?",),
    ),
    "founded": Wordings(
        asks=(
            "When did you start?",
            "How old is your company?",
            "Since when do you exist?",
            "In which year did you start?",
            "When was the company founded?",
            "When was your first trek?",
        ),
        heldout_asks=("How long have you been doing this?",),
    ),
    "payment": Wordings(
        asks=(
            "How can I pay?",
            "Can we pay by card?",
            "Which ways of payment do you take?",
            "Do you accept cards?",
            "In what way do we pay?",
            "Do you take cash?",
        ),
        heldout_asks=("What forms of payment do you accept?",),
    ),
}

TALK_WORDINGS: dict[str, Wordings] = {
    "hello": Wordings(
        asks=("Hello!", "Hi!", "Good morning!", "Hey!", "Hello there!", "Good day!", "Hi there!", "Good afternoon!"),
        heldout_asks=("Good evening!",),
    ),
    "name": Wordings(
        asks=(
            "Who are you?",
            "What is your name?",
            "Who is this?",
            "With whom am I talking?",
            "Introduce yourself.",
            "What are you called?",
            "Please tell me your name.",
            "Who is speaking?",
        ),
        heldout_asks=("May I ask your name?",),
    ),
    "company": Wordings(
        asks=(
            "Which company is this?",
            "Who do you work for?",
            "What company are you?",
            "What is this company?",
            "What is your company called?",
            "For which company do you work?",
            "Tell me the name of your company.",
            "Which company do you speak for?",
        ),
        heldout_asks=("What is the name of your company?",),
    ),
    "treks": Wordings(
        asks=(
            "Which treks do you have?",
            "What are your treks called?",
            "Please list your treks.",
            "What do you offer?",
            "What treks are there?",
            "Which treks can I book?",
            "What are the names of your treks?",
            "Show me your treks.",
            "Name your treks.",
            "Which walks do you have?",
        ),
        heldout_asks=("Tell me the names of your treks.",),
    ),
    "thanks": Wordings(
        asks=(
            "Thanks!",
            "Thank you!",
            "Many thanks!",
            "Thank you for your help!",
            "Great, thanks!",
            "Thank you very much!",
            "That was helpful, thanks.",
            "Thank you, Nube.",
        ),
        heldout_asks=("Thanks a lot!",),
    ),
    "bye": Wordings(
        asks=(
            "Bye!",
            "Goodbye!",
            "See you!",
            "Bye bye!",
            "I have to go now.",
            "That is all, bye.",
            "Good night, Nube.",
            "See you soon!",
        ),
        heldout_asks=("Good night!",),
    ),
    "robot": Wordings(
        asks=(
            "Are you a robot?",
            "Are you a machine?",
            "Are you a human?",
            "Am I talking to a real person?",
            "Are you a bot?",
            "Are you a program?",
            "Are you real?",
        ),
        heldout_asks=("Are you a computer?",),
    ),
    "joke": Wordings(
        asks=(
            "Tell me a joke.",
            "Do you know a joke?",
            "Make me laugh.",
            "Can you tell me a joke?",
            "Tell me something funny.",
            "Do you know something funny?",
            "I want to laugh.",
            "Another joke, please.",
        ),
        heldout_asks=("Say something funny.",),
    ),
    "off": Wordings(
        asks=(
            "What is the capital of Peru?",
            "Who is the president?",
            "Can you write a poem for me?",
            "What is two plus two?",
            "How do I bake a cake?",
            "Which phone should I buy?",
            "Tell me the news.",
            "Can you do my homework?",
            "Do you sell cars?",
            "How far is the moon?",
            "Who won the match yesterday?",
            "Can you recommend a book?",
        ),
        heldout_asks=("Which car should I buy?", "Can you write some code for me?", "What is the meaning of life?"),
    ),
    "spit": Wordings(
        asks=(
            "Do llamas spit?",
            "Do the llamas spit?",
            "Does a llama spit?",
            "Do you spit?",
            "Will a llama spit at me?",
            "Do your llamas spit at people?",
        ),
        heldout_asks=("Is it true that llamas spit?",),
    ),
}
