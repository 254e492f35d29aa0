"""Text for training the sparse autoencoder: books in the public domain, and what SmolLM2 writes on subjects named here.

    python tutorials/sae/text.py FOLDER        # FOLDER/text.jsonl, 1,736 texts, about eight CPU minutes

The books, plain UTF-8 from Project Gutenberg (gutenberg.org/ebooks/NUMBER), lie in FOLDER/books/NUMBER.txt; their authors
died more than seventy years ago. The model is under Apache-2.0 and writes at temperature 1 from the prompts below.
"""

from __future__ import annotations

import json
import random
import re
import sys
from pathlib import Path

import torch

from steerlens.models import smollm2

#: Numbers of Project Gutenberg, and how many tokens are taken of each, in passages spread over the book.
BOOKS = {
    2701: "Herman Melville, Moby-Dick",
    1342: "Jane Austen, Pride and Prejudice",
    1661: "Arthur Conan Doyle, The Adventures of Sherlock Holmes",
    160: "Kate Chopin, The Awakening and Selected Short Stories",
    944: "Charles Darwin, The Voyage of the Beagle",
    805: "F. Scott Fitzgerald, This Side of Paradise",
    5423: "Victor Hugo, L'homme qui rit",
}
PER_BOOK, PASSAGE = 26_000, 90

FORMS = """Write a short story about {}.
Write a diary entry about {}.
Explain {} to a child.
Write an encyclopedia article about {}.
Write a news report about {}.
Write a letter to a friend about {}.
Write an angry complaint about {}.
Write an enthusiastic review of {}.
Write a disappointed review of {}.
Write a dialogue between two people who disagree about {}.
Write a poem about {}.
List ten facts about {}.
Give step by step instructions for a beginner who wants to know more about {}.
Write a speech about {}.
Describe the history of {}.
Write a scientific abstract about {}.
Write an advertisement for {}.
Write the opening of a novel about {}.
Answer a customer's question about {}.
Write a short text about {} in French.
Write a short text about {} in Spanish.
Write an exam question about {} and its answer.
Write a business email about {}.
Write a travel guide about {}.
Write a Python program that has to do with {}.
Write a joke about {}.
Write an interview with an expert on {}.
Write a set of rules for {}.
Tell a sad story about {}.
Tell a happy story about {}.""".splitlines()

SUBJECTS = """the sea; a storm on the coast; sailing; fishing; whales; a lighthouse; a wedding; a marriage proposal; a birthday party;
a funeral; grandparents; a newborn baby; an old friend; school; a teacher; university exams; a football match; chess;
the Olympic Games; running a marathon; swimming; a railway journey; an airport; a bus driver; bicycles; an electric car;
a traffic jam; the city of Paris; the city of London; New York; Japan; India; Brazil; Africa; Australia; China; Germany; Russia;
the mountains; a forest; the desert; a river; gardens; roses; farming; bread; cheese; a restaurant; coffee; wine; cooking soup;
chocolate; breakfast; a cat; a dog; horses; birds; insects; bees; dinosaurs; the human heart; a hospital; a dentist; vaccines;
sleep; dreams; mental health; exercise; a diet; the Moon; Mars; the Sun; black holes; the Big Bang; gravity; atoms; water;
electricity; magnets; chemistry; the periodic table; evolution; DNA; climate change; rain; snow; earthquakes; volcanoes; energy;
mathematics; prime numbers; probability; geometry; a computer; the internet; a smartphone; programming; databases; robots;
artificial intelligence; video games; a film; a theatre play; a violin; a pop song; a painter; a museum; photography; a novel;
a library; a newspaper; language; grammar; the French language; philosophy; religion; a church; Christmas; Easter; war; peace;
a king; a queen; the Roman Empire; ancient Egypt; the Middle Ages; the French Revolution; a president; an election; voting;
a court of law; a contract; a crime; the police; a prison; money; a bank; taxes; a house; an apartment; furniture; clothes; shoes;
fashion; hair; a job interview; an employer; a strike; a shop; a market; a hotel; holidays; camping; a lost key; a broken window;
an argument; anger; love; fear; joy; sadness; pride; luck; time; a clock; the calendar; numbers; colours; the colour red; music;
silence; a secret; a ghost; a dragon; a pirate; a wizard; a detective; a spy; an astronaut; a soldier; a nurse; a farmer;
a lawyer; a journalist; a thief; twins; a family; a divorce; neighbours; a party; beer; smoking; sugar; salt; fire; ice; gold;
iron; glass; plastic; paper; wood; stone; oil; waste; recycling; a bridge; a tower; a castle; a tunnel; a ship; an aeroplane"""

TOKENS, NEW, BATCH = 20_000, 120, 96


@torch.inference_mode()
def write(folder: Path) -> None:
    model, tokenizer = smollm2(host="hf", dtype=torch.bfloat16)
    tokenizer.padding_side = "left"
    subjects = [subject.strip() for subject in SUBJECTS.replace("\n", " ").split(";")]
    prompts = [form.format(subject) for form in FORMS for subject in subjects]
    random.Random(0).shuffle(prompts)
    found = folder / "written.jsonl"
    done = found.read_text().splitlines() if found.exists() else []
    written = sum(len(tokenizer(json.loads(line)["text"])["input_ids"]) for line in done)
    with found.open("a") as file:
        for start in range(len(done), len(prompts), BATCH):
            if written >= TOKENS:
                return
            torch.manual_seed(start)  # of each batch, so that a run may be broken off and go on
            asked = [[{"role": "user", "content": prompt}] for prompt in prompts[start : start + BATCH]]
            batch = tokenizer.apply_chat_template(
                asked, add_generation_prompt=True, return_tensors="pt", padding=True, return_dict=True
            )
            out = model.generate(**batch, max_new_tokens=NEW, do_sample=True, temperature=1.0, top_k=0)
            texts = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
            for text in texts:
                file.write(json.dumps({"text": text}) + "\n")
                written += len(tokenizer(text)["input_ids"])
            file.flush()
            print(f"{written} tokens", flush=True)


def passages(book: str) -> list[str]:
    """Of some ninety words each, from paragraph to paragraph, without the notes of Project Gutenberg."""
    body = re.split(r"\*\*\* ?(?:START|END) OF.*\*\*\*", book)
    body = max(body, key=len).replace("_", "")
    found, words = [], []
    for paragraph in re.split(r"\n\s*\n", body):
        words += paragraph.split()
        if len(words) >= PASSAGE:
            found.append(" ".join(words[: 2 * PASSAGE]))
            words = []
    return found


def collect(folder: Path) -> None:
    """Passages of the books and what the model wrote, shuffled, one JSON object a line."""
    _, tokenizer = smollm2(host="hf")
    texts = [json.loads(line)["text"] for line in (folder / "written.jsonl").read_text().splitlines()]
    for number in BOOKS:
        found = passages((folder / "books" / f"{number}.txt").read_text(encoding="utf-8-sig"))
        lengths = [min(len(ids), 128) for ids in tokenizer(found)["input_ids"]]
        every = max(1, sum(lengths) // PER_BOOK)
        texts += found[every // 2 :: every]
    random.Random(0).shuffle(texts)
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    print(f"{len(texts)} texts, {sum(map(len, tokenizer(texts)['input_ids']))} tokens")


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    write(target)
    collect(target)
