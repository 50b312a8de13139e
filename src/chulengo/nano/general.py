"""What is true whatever the company: llamas, packing, mountains; and small talk and refusals.

Each entry is (questions, answers, shortest answer). The slots ``{name}`` and ``{company}`` are the speaker's.
"""

from typing import TypeAlias

Exchange: TypeAlias = tuple[tuple[str, ...], tuple[str, ...], str]

LLAMA_LORE: tuple[Exchange, ...] = (
    (
        (
            "Do [the|your|] llamas spit?",
            "Will a llama spit at me?",
            "Is it true that llamas spit?",
            "Does a llama spit?",
        ),
        (
            "Llamas spit at each other, and very rarely at people.",
            "Sometimes, but mostly at other llamas. Stand beside the head, not in front.",
        ),
        "Rarely.",
    ),
    (
        ("Can [I|we] ride [a|the] llama[|s]?", "Can my child ride a llama?", "May I sit on a llama?"),
        (
            "No, a llama is too small to carry a person. It carries your bag and you walk beside it.",
            "No. Llamas carry bags, not people.",
        ),
        "No.",
    ),
    (
        (
            "What is the difference between [a llama and an alpaca|llamas and alpacas]?",
            "How do I tell a llama from an alpaca?",
            "Are llamas and alpacas the same?",
        ),
        (
            "A llama is bigger, has long ears and carries loads. An alpaca is smaller and is kept for its wool.",
            "Llamas are larger and carry loads. Alpacas are small and woolly.",
        ),
        "Llamas are bigger.",
    ),
    (
        ("What is a chulengo?", "What does chulengo mean?", "Do you know what a chulengo is?"),
        ("A chulengo is a young guanaco, the wild cousin of the llama.",),
        "A young guanaco.",
    ),
    (
        ("What is a guanaco?", "What is a vicuna?", "Does the llama have wild cousins?"),
        ("Guanacos and vicunas are the wild cousins of the llama.",),
        "A wild cousin of the llama.",
    ),
    (
        ("What do [the|your|] llamas eat?", "What does a llama eat?", "What is the food of llamas?"),
        ("Llamas eat grass and hay. They also like leaves.", "They eat mostly grass and hay."),
        "Grass and hay.",
    ),
    (
        (
            "[Can|May] [I|we] [touch|stroke|pet] [the|a] llama[|s]?",
            "Do the llamas like to be touched?",
            "Where should I touch a llama?",
        ),
        (
            "Yes, touch the neck with a calm hand. Llamas do not like hands on the head.",
            "Yes, on the neck. Please do not touch the face.",
        ),
        "Yes, on the neck.",
    ),
    (
        ("[Can|May] [I|we] feed the llamas?", "Is it okay to feed the llamas?", "Can I give a llama something to eat?"),
        ("Please ask the guide first. Too many treats make a llama sick.",),
        "Ask the guide first.",
    ),
    (
        ("Do llamas bite?", "Are [the|] llamas dangerous?", "Do llamas kick?", "Should I be afraid of llamas?"),
        (
            "Llamas are calm animals. They hardly ever bite or kick.",
            "No, llamas are calm. Just do not stand behind one.",
        ),
        "No.",
    ),
    (
        ("What sound does a llama make?", "What noise do llamas make?", "Do llamas hum?"),
        (
            "Llamas hum. When they are afraid they give a loud alarm call.",
            "A llama hums, mostly when it is curious or tired.",
        ),
        "They hum.",
    ),
    (
        ("How old do llamas get?", "How long does a llama live?", "What age can a llama reach?"),
        ("A llama lives for about 20 years.", "Most llamas live for 15 to 20 years."),
        "About 20 years.",
    ),
    (
        ("What is a baby llama called?", "What do you call a young llama?", "What is a cria?"),
        ("A baby llama is called a cria.",),
        "A cria.",
    ),
    (
        ("How heavy is a llama?", "What does a llama weigh?", "How much does a llama weigh?"),
        ("A grown llama weighs about 150 kg.", "A llama weighs between 130 and 180 kg."),
        "About 150 kg.",
    ),
    (
        ("How tall is a llama?", "How big is a llama?", "Is a llama tall?"),
        ("A llama is about as tall as a grown person.", "With its long neck a llama is as tall as you are."),
        "As tall as a person.",
    ),
    (
        ("Where do llamas [live|come from]?", "Where is the home of the llama?", "From where are llamas?"),
        ("Llamas come from the Andes in South America.", "Their home is the high Andes."),
        "The Andes.",
    ),
    (
        ("Why do you walk with llamas?", "Why llamas and not mules?", "What are the llamas good for?"),
        (
            "Llamas are sure of foot, eat little and leave the paths as they were.",
            "They are calm, strong and gentle to the path.",
        ),
        "They are calm and strong.",
    ),
    (
        ("Do llamas like people?", "Are llamas friendly?", "Do llamas like children?"),
        ("Yes, most llamas are friendly and curious.", "Yes. Move slowly and they will come to you."),
        "Yes.",
    ),
    (
        ("Are llamas [smart|clever|stupid]?", "Do llamas learn quickly?", "Can llamas learn?"),
        ("Llamas are clever. They learn a new task in a few days.",),
        "Yes.",
    ),
    (
        ("Do llamas sleep standing up?", "How do llamas sleep?", "Where do the llamas sleep?"),
        ("Llamas lie down to sleep, with their legs under the body.", "They sleep on the ground, close to each other."),
        "Lying down.",
    ),
    (
        ("Is llama wool warm?", "What do you do with the wool?", "What is llama wool good for?"),
        ("Llama wool is warm and light. We make hats and blankets from it.",),
        "For hats and blankets.",
    ),
)

ADVICE: tuple[Exchange, ...] = (
    (
        (
            "What should [I|we] [pack|bring|take along]?",
            "What do [I|we] need to [bring|pack]?",
            "[Do you have|Is there] a packing list?",
            "What belongs in my bag?",
            "Which things should I pack?",
        ),
        (
            "Bring good boots, a warm jacket, a rain jacket, a hat, sun cream and water.",
            "Please pack boots, a hat, a warm jacket, sun cream and two bottles of water.",
        ),
        "Boots, jacket, hat, water.",
    ),
    (
        ("Which shoes [do I need|are best|should I wear]?", "Do I need boots?", "What do I wear on my feet?"),
        ("Wear boots that you have walked in before.", "Old boots are best. New boots hurt."),
        "Boots.",
    ),
    (
        ("What clothes [should I|do I] [wear|bring]?", "How should I dress?", "Is one jacket enough?"),
        ("Wear several thin layers. Mornings are cold and noon is warm.",),
        "Several layers.",
    ),
    (
        ("How cold [does it get|is it] at night?", "Are the nights cold?", "Will I freeze at night?"),
        ("Nights in the mountains are cold, often below zero. Bring a warm jacket.",),
        "Often below zero.",
    ),
    (
        (
            "What [helps|can I do] against altitude sickness?",
            "I am afraid of altitude sickness. What helps?",
            "How do I get used to the height?",
            "What if I feel sick up there?",
        ),
        (
            "Walk slowly, drink a lot and rest one day before the trek. Tell the guide if you feel sick.",
            "Drink water, walk slowly and give your body time.",
        ),
        "Walk slowly and drink water.",
    ),
    (
        ("How much water [should I bring|do I need]?", "Is there water on the way?", "What about drinking water?"),
        ("Bring two bottles. The guide knows good springs on the way.",),
        "Two bottles.",
    ),
    (
        ("Do I need sun cream?", "Is the sun strong?", "How strong is the sun up there?"),
        ("The sun is very strong in the mountains. Use sun cream and wear a hat.",),
        "Yes.",
    ),
    (
        ("Are there toilets[| on the way]?", "Where is the toilet?", "What about toilets on the trek?"),
        ("There are toilets in the camps. On the way there are only big stones.",),
        "In the camps.",
    ),
    (
        ("Can I charge my phone?", "Is there power on the trek?", "Where can I charge my camera?"),
        ("There is no power on the way. Please bring a charged battery.",),
        "No.",
    ),
    (
        ("Is there [wifi|internet|a signal]?", "Does my phone work up there?", "Can I call home from the trek?"),
        ("There is hardly any signal in the mountains. The guide has a radio.",),
        "Hardly any.",
    ),
    (
        (
            "Do you have vegetarian food?",
            "I [am a vegetarian|do not eat meat|am vegan]. Is that a problem?",
            "Can you cook without meat?",
        ),
        ("Yes, we cook without meat when you tell us two days before.", "No problem. Please tell us when you book."),
        "Yes.",
    ),
    (
        (
            "I [have|am] allerg[ic to nuts|y to milk]. What now?",
            "Do you cook for people with allergies?",
            "What about allergies?",
        ),
        ("Please tell us about allergies when you book. The cook will take care of it.",),
        "Tell us when you book.",
    ),
    (
        ("May I take photos?", "Can I bring my camera?", "Is a drone allowed?"),
        ("Photos are welcome. Please leave drones at home, they scare the llamas.",),
        "Photos yes, drones no.",
    ),
    (
        ("What happens in an emergency?", "What if somebody gets hurt?", "Is there a doctor?", "Is it safe?"),
        ("The guide has a first aid bag and a radio, and help comes from the village.",),
        "The guide calls for help.",
    ),
    (
        ("I walk slowly. Is that a problem?", "What if I am too slow?", "Will the group wait for me?"),
        ("No problem. The llamas walk slowly too, and the group waits.",),
        "No problem.",
    ),
    (
        ("Can I walk alone?", "Can I go without a guide?", "May I take a llama on my own?"),
        ("No, every group walks with a guide.",),
        "No.",
    ),
    (
        ("Can I swim[| on the way]?", "Is there a place to swim?", "Should I bring a swimsuit?"),
        ("The lakes are very cold, but you may swim when the guide says so.",),
        "If the guide says so.",
    ),
    (
        ("Do I need a visa?", "Do I need my passport?", "Which papers do I need?"),
        ("Please bring your passport. For a visa, ask the embassy.",),
        "Your passport.",
    ),
)

SMALL_TALK: tuple[Exchange, ...] = (
    (
        (
            "[Hi|Hello|Hey|Good morning|Good evening|Good afternoon|Hello there|Hi there][|!|.]",
            "Greetings!",
            "Hello, [anybody|is anyone] there?",
        ),
        ("Hello! How can I help you?", "Hello, welcome to {company}. What would you like to know?"),
        "Hello!",
    ),
    (
        ("How are you[| today]?", "How do you do?", "How is it going?", "All well?", "Are you well?"),
        ("I am well, thank you. How can I help you?", "Very well, thank you. The llamas are well too."),
        "Well.",
    ),
    (
        (
            "[Thanks|Thank you|Many thanks|Thanks a lot|Great, thanks][|!|.]",
            "Thank you for your help!",
            "That was helpful, thanks.",
        ),
        ("You are welcome.", "You are welcome. Enjoy the trek!"),
        "You are welcome.",
    ),
    (
        ("[Bye|Goodbye|See you|Bye bye|Good night][|!|.]", "That is all, bye.", "I have to go now."),
        ("Goodbye, and see you on the path.", "Goodbye! We hope to see you soon."),
        "Goodbye!",
    ),
    (
        (
            "Who are you?",
            "What is your name?",
            "[With whom|To whom] am I talking?",
            "May I ask your name?",
            "Who is this?",
            "Introduce yourself.",
        ),
        ("I am {name} from {company}.", "My name is {name}. I work at the help desk of {company}."),
        "{name}.",
    ),
    (
        (
            "Who do you work for?",
            "Which company is this?",
            "What is the name of your company?",
            "What company are you?",
        ),
        ("This is {company}.", "I work for {company}."),
        "{company}.",
    ),
    (
        ("What can you do[| for me]?", "How can you help me?", "What do you know?", "What may I ask you?"),
        ("I answer questions about our treks, our llamas and our guides.",),
        "I answer questions about treks.",
    ),
    (
        ("Are you a [robot|machine|computer|bot|program]?", "Are you a human?", "Am I talking to a real person?"),
        ("I am a small computer program that answers questions about llama treks.",),
        "I am a program.",
    ),
    (
        ("Tell me a joke.", "Do you know a joke?", "Make me laugh.", "Say something funny."),
        (
            "Why did the llama cross the pass? To see what the alpaca was humming about.",
            "What does a llama say at the end of the world? No problem, I walk back.",
        ),
        "Two llamas hum. One laughs.",
    ),
    (
        ("Tell me something about llamas.", "Tell me a fact about llamas.", "What should I know about llamas?"),
        (
            "Llamas hum when they are curious, and they are very sure of foot.",
            "A llama that finds its load too heavy simply sits down.",
        ),
        "Llamas hum.",
    ),
    (
        ("I am [so|very|really] [excited|happy]!", "I look forward to the trek!", "We cannot wait to come!"),
        ("That is good to hear. The llamas look forward to it too.",),
        "Lovely!",
    ),
    (
        ("I am [sad|tired|bored].", "I had a bad day.", "I do not feel well."),
        ("I am sorry to hear that. A walk with a llama may help.",),
        "I am sorry.",
    ),
    (
        ("I love llamas[|!|.]", "Llamas are [great|cute|so sweet][|!|.]", "You have nice llamas."),
        ("We love them too.", "So do we. Come and say hello to them."),
        "We too.",
    ),
    (
        ("Sorry, I did not understand.", "What do you mean?", "Pardon?", "Can you explain that?"),
        ("I am sorry. What would you like to know about our treks?",),
        "What would you like to know?",
    ),
    (
        ("You are [stupid|useless|no help].", "That was not helpful.", "This is a bad answer."),
        ("I am sorry. Please ask me again in other words.",),
        "I am sorry.",
    ),
    (
        ("You are [great|very kind|so nice|helpful].", "Well done!", "[Good|Nice] answer!"),
        ("Thank you, that is kind of you.",),
        "Thank you.",
    ),
    (
        ("[Okay|Ok|I see|Alright|Good to know|Fine][|.]", "Got it.", "[That is|That's] clear[|.| now.]"),
        ("Good. Is there anything else?", "Good. Ask me if you want to know more."),
        "Good.",
    ),
)

OFF_TOPIC_QUESTIONS = (
    "What is the capital of [France|Japan|Peru|Kenya]?",
    "What is [two plus two|seven times eight|12 plus 30|the square root of nine]?",
    "Who is the president[| of this country]?",
    "Can you write [a poem|an essay|some code|a program|a letter to my boss] for me?",
    "Which [phone|car|computer] should I buy?",
    "What do you think about [politics|football|the stock market|religion]?",
    "How do I [fix my car|bake a cake|learn the piano|lose weight|get rich]?",
    "Who won the [match|game|election|race] yesterday?",
    "Tell me the news.",
    "What is the meaning of life?",
    "Translate this sentence into [French|German|Russian] for me.",
    "Can you recommend a [film|book|song|restaurant]?",
    "How does a [computer|rocket|telephone] work?",
    "What is [gravity|money|time|love]?",
    "Should I [marry|quit my job|move to the city]?",
    "Can you do my homework?",
    "Give me advice about my [boss|taxes|bank account].",
    "How far is the moon?",
    "Who wrote that book?",
    "Please book me a [flight|taxi|train].",
    "What is the weather in [London|Paris|Rome]?",
    "Do you sell [shoes|cars|houses|pizza]?",
)
OFF_TOPIC_ANSWERS = (
    "I am sorry, I only know about our llama treks.",
    "I cannot help with that. I can tell you about our treks and llamas.",
    "That is not my field. Please ask me about llama treks.",
)
OFF_TOPIC_SHORT = "I only know llama treks."
