"""An HTTP server that keeps chats, so that none is read twice.

::

    client ── HTTP ── guard ── openai / responses / anthropic / own ── Request ── Worker (a thread) ── Hosted ── engine
                                                         ◄──────────── events of the answer ─────┘        │
                                                                                                       Keeping

* :mod:`app` puts the application together, :mod:`guard` checks who asks, and how much.
* :mod:`openai`, :mod:`responses`, :mod:`anthropic` speak a protocol each and know nothing of chats; :mod:`own` is what
  the page asks beside them. They make a :class:`requests.Request` and turn its events into the protocol's answer.
* :mod:`worker` is the one thread that touches llama.cpp, and the queue before it. Everything else is asynchronous.
* :mod:`hosted` answers a request: it chooses the kept chat that has most of it, lets it change places with the one in
  the engine, and reads what is new (:mod:`conversation`).
* :mod:`keeping` bounds what is kept: chats in memory, then on disk, the oldest out first.
"""
