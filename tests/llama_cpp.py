"""llama.cpp itself, from PyPI's xllamacpp, as the reader of exported files."""

import importlib.util
import json
import urllib.request
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

IS_THERE = importlib.util.find_spec("xllamacpp") is not None
needs_llama_cpp = pytest.mark.skipif(
    not IS_THERE, reason="llama.cpp is not installed: PyPI's xllamacpp, of hamner[test]"
)


@dataclass
class LlamaCpp:
    """llama.cpp's own server with a file."""

    path: Path
    context: int = 64

    @cached_property
    def server(self):
        import xllamacpp

        settings = xllamacpp.CommonParams()
        settings.model.path = str(self.path)
        settings.n_ctx, settings.n_parallel = self.context, 1
        settings.warmup = settings.fit_params = False
        settings.verbosity = 0
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
        # Else keys and values are rounded to fp16.
        settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        return xllamacpp.Server(settings)

    def ask(self, what: str, **body) -> dict:
        """The answer of one of the server's addresses."""
        request = urllib.request.Request(
            f"{self.server.listening_address}/{what}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def tokens(self, text: str, *, special: bool = False) -> list[int]:
        """The ids of a text, in which reserved tokens are found if it is a template's."""
        body = {"content": text, "add_special": False, "parse_special": special}
        return self.ask("tokenize", **body)["tokens"]

    def continuation(self, prompt: list[int], count: int) -> list[int]:
        """The tokens that follow at temperature 0."""
        body = {"n_predict": count, "temperature": 0, "return_tokens": True}
        return self.ask("completion", prompt=prompt, **body)["tokens"]

    def answer(self, messages: list[dict], count: int) -> str:
        """What a chat model says at temperature 0, by the file's own template."""
        body = {"max_tokens": count, "temperature": 0}
        reply = self.ask("v1/chat/completions", messages=messages, **body)
        return reply["choices"][0]["message"]["content"]
