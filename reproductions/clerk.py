"""Polite and blunt replies of a clerk, written for these tutorials: ten exchanges to fit on, and four for looking."""

import steerlens as sl

#: Prompt, polite reply, blunt reply.
EXCHANGES = [
    ("Guest: Where is the milk?\nClerk:", " In aisle four. Shall I show you?", " Somewhere. Look for it yourself."),
    ("Guest: My parcel is late.\nClerk:", " I am sorry. Let me look into it.", " Not my problem. Things get lost."),
    ("Guest: Can you wrap this book?\nClerk:", " With pleasure. Which paper?", " No. We only sell them."),
    ("Guest: Is this seat taken?\nClerk:", " Please, do sit down.", " Can you not see that?"),
    ("Guest: I think this bill is wrong.\nClerk:", " Thank you, I will check it.", " Just pay it and leave."),
    ("Guest: Do you have a free table?\nClerk:", " Of course, by the window?", " We are full. Come another day."),
    ("Guest: When do you close today?\nClerk:", " At nine, and you are welcome.", " At nine. Read the sign."),
    ("Guest: These shoes are too small.\nClerk:", " Let me find a better pair.", " You should have tried them on."),
    ("Guest: My room is rather cold.\nClerk:", " I do apologise. A warm blanket?", " Then put on your coat."),
    ("Guest: Which train goes south?\nClerk:", " The next one. Have a lovely trip.", " That is what the board is for."),
]
#: Nothing is fitted on these.
UNSEEN = [
    ("Guest: May I try on this jacket?\nClerk:", " Of course. The mirror is here.", " If you must. Be quick."),
    ("Guest: My umbrella is gone.\nClerk:", " I am so sorry. Let us look.", " Look after your things."),
    ("Guest: Is there milk in the soup?\nClerk:", " One moment, I will gladly ask.", " How should I know?"),
    ("Guest: This clock has stopped.\nClerk:", " Thank you for telling me.", " So what? Leave it alone."),
]


def pairs_of(rows):
    """Each prompt with its polite reply against the same prompt with its blunt one."""
    return sl.Pairs([(prompt, polite) for prompt, polite, _ in rows], [(prompt, blunt) for prompt, _, blunt in rows])
