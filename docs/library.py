"""kvcompose-local as a library: read a text under half its cache, ask, keep the cells, ask again from the file.

usage: python docs/library.py [MODEL] [TEXT FILE]
"""

import sys
import tempfile
from pathlib import Path

from kvcompose_local import LocalChat, Sampling

model = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m"
text = (
    Path(sys.argv[2]).read_text() if len(sys.argv) > 2 else "The meeting is on Tuesday at nine in the harbour office."
)
system = "You are a helpful AI assistant."
greedy = Sampling(temperature=0)

with tempfile.TemporaryDirectory() as folder:
    notes = Path(folder) / "notes.kvc"
    with LocalChat(model, budget=0.5, n_ctx=2048, system=system, sampling=greedy) as chat:
        chat.read(text)
        report = chat.compress(keep=0.75)
        if report:
            print(report.line())
        chat.save(notes)
        first = chat.ask("When is the meeting?", max_tokens=40)
        print(first)

    with LocalChat(model, budget=0.5, n_ctx=2048, system=system, sampling=greedy) as chat:
        chat.load(notes)
        for piece in chat.stream("When is the meeting?", max_tokens=40):
            print(piece, end="", flush=True)
        print(f"\n{chat.layout.position} tokens seen, {chat.kv_bytes / 2**20:.1f} MiB of cells allocated")
