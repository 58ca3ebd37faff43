"""The module has servers that run in a thread of the test, on a port of their own."""

import contextlib
import socket
import threading
from collections.abc import Iterator

from hamner.chat.config import HOST, ChatConfig
from hamner.chat.protocol import ServedModel
from hamner.chat.server import ChatServer
from hamner.data.tokenizer import load_tokenizer
from hamner.model.sampling import Sampling
from tests.scripted import Script

DEFAULT = Sampling(temperature=0.5)
END = 4
"""the token that ends an answer"""


class SlowScript(Script):
    """The script waits at every token until the test lets it go on."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.may_speak = threading.Event()
        self.spoken = 0

    def tokens(self, prompt, sampling, *, seed, unpenalized):
        for token in super().tokens(prompt, sampling, seed=seed, unpenalized=unpenalized):
            assert self.may_speak.wait(30)
            self.spoken += 1
            yield token


def says(text: str, **kwargs) -> Script:
    """The script answers every conversation with a text."""
    tokenizer = load_tokenizer(vocab_size=261)
    return Script(tokenizer, [*tokenizer.encode(text), END], **kwargs)


@contextlib.contextmanager
def serving(
    generator, *, is_chat: bool = True, max_new_tokens: int = 100, **config
) -> Iterator[str]:
    """The context has a server of the model `mine`, and gives its address."""
    config = ChatConfig(sampling=DEFAULT, max_new_tokens=max_new_tokens, **config)
    listener = socket.socket()
    listener.bind((HOST, 0))
    # Who asks before uvicorn is ready waits.
    listener.listen()
    server = ChatServer(ServedModel(generator, "mine", config, is_chat)).uvicorn
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://{HOST}:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
