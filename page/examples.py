"""Texts to begin with in *Run*: whatever repeats itself in its second half can be learned from the
first.
"""

EXAMPLES = {
    "A river": (
        "The river rises in the hills above the town. It runs through the town, past the mill and "
        "the market, and then the river meets the sea. In spring the river is high and brown. In "
        "summer the river is low, and children cross it on stones. The miller watches the river "
        "every morning. When the river is high, the mill runs; when the river is low, the miller "
        "goes to the market and waits for rain in the hills."
    ),
    "Names": (
        "Ada keeps bees. Boris keeps goats. Clara keeps hens. Every morning Ada looks after the "
        "bees, Boris looks after the goats and Clara looks after the hens. Every evening Ada "
        "talks about her bees, Boris talks about his goats and Clara talks about her hens. Nobody "
        "asks who keeps what: Ada keeps bees, Boris keeps goats, and Clara keeps hens."
    ),
    "A list": (
        "1. Open the door. 2. Close the door. 3. Open the window. 4. Close the window. 5. Open "
        "the gate. 6. Close the gate. 7. Open the box. 8. Close the box. 9. Open the book. 10. "
        "Close the book."
    ),
}
