"""The tests use the page as people do, in headless Chromium."""

import contextlib
import json
import re
import shutil
import threading
import time
from dataclasses import replace

import pytest

from hamner.data.chat_template import Message, render_prompt
from hamner.data.tokenizer import load_tokenizer
from hamner.model.generate import Generator
from hamner.model.sampling import Sampling
from tests.chat.serving import DEFAULT, END, serving
from tests.models import DENSE
from tests.saved import sharp
from tests.scripted import Script

playwright = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed (it is in hamner[test])"
)
expect = playwright.expect
NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)

pytestmark = [
    # One browser for all.
    pytest.mark.xdist_group("browser"),
    pytest.mark.skipif(
        CHROMIUM is None, reason=f"there is none of {', '.join(NAMES)}: apt-get install chromium"
    ),
]
TOKENIZER = load_tokenizer(vocab_size=261)
STRANGER = "stranger.example"
"""a name that points at this machine"""


class Author(Script):
    """The author answers what the test lets it, when the test lets it."""

    def __init__(self, ending: int = END, context: int = 1000) -> None:
        super().__init__(TOKENIZER, [], context)
        self.ending = ending
        self.texts: list[str] = []
        """what it says next; the last one again and again"""
        self.pace = 0.0
        """seconds that each of its tokens takes"""
        self.may_finish = threading.Event()
        """whether it says all, or waits at a `~`, which it does not say"""
        self.spoken = 0
        """how many tokens it gave out, in all"""

    def says(self, *texts: str) -> None:
        """The method sets what comes next."""
        self.texts, self.pace = list(texts), 0.0
        self.may_finish.set()

    def starts(self, text: str) -> None:
        """The method sets what comes next, in which it waits where the text has a `~`."""
        self.says(text)
        self.may_finish.clear()

    def tokens(self, prompt, sampling, *, seed, unpenalized):
        text = self.texts.pop(0) if len(self.texts) > 1 else self.texts[0]
        self.ids = [*TOKENIZER.encode(text), self.ending]
        (pause,), pace = TOKENIZER.encode("~"), self.pace
        for token in super().tokens(prompt, sampling, seed=seed, unpenalized=unpenalized):
            if token == pause:
                assert self.may_finish.wait(30)
                continue
            self.spoken += 1
            time.sleep(pace)
            yield token


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        expect.set_options(timeout=30_000)
        points_here = f"--host-resolver-rules=MAP {STRANGER} 127.0.0.1"
        browser = started.chromium.launch(executable_path=CHROMIUM, args=[points_here])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def served():
    """The author, and the address of its server."""
    author = Author()
    with serving(author, max_new_tokens=500) as url:
        yield author, url


@pytest.fixture
def author(served):
    served[0].prompts.clear()
    return served[0]


@pytest.fixture
def page(browser, served, author):
    with opened(browser, served[1]) as page:
        yield page


@pytest.fixture(scope="module")
def served_text():
    """The author of a base model, and the address of its server."""
    author = Author(TOKENIZER.eot_id, context=80)
    with serving(author, is_chat=False) as url:
        yield author, url


@contextlib.contextmanager
def opened(browser, url: str, script: str = "", **settings):
    """The context has a page in a browser that has never been there, and minds its errors."""
    context = browser.new_context(viewport={"width": 1000, "height": 700}, **settings)
    page = context.new_page()
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on(
        "console",
        lambda message: errors.append(message.text) if "Policy" in message.text else None,
    )
    page.on("dialog", lambda dialog: errors.append(dialog.message))
    if script:
        page.add_init_script(script)
    try:
        start(page, url)
        yield page
        assert errors == []
    finally:
        context.close()


def start(page, url: str) -> None:
    page.goto(url)
    expect(page.locator("#model")).to_have_text("mine")


def type_in(page, text: str) -> None:
    page.fill("#input", text)
    page.press("#input", "Enter")


def finish(page) -> None:
    expect(page.locator("#send")).not_to_have_class(re.compile("running"))


def say(page, text: str) -> None:
    type_in(page, text)
    finish(page)


def turns(page) -> list[str]:
    return page.locator(".turn .body").all_inner_texts()


def titles(page) -> list[str]:
    return page.locator("#list .open").all_inner_texts()


def delete(page, title: str) -> None:
    page.get_by_role("button", name=title, exact=True).hover()
    page.get_by_role("button", name=f"Delete {title}").click()


def streamed(*pieces: str, end: str = "data: [DONE]\n\n") -> str:
    """The function gives an answer as the server streams it."""
    chunks = [{"model": "mine", "choices": [{"delta": {"content": piece}}]} for piece in pieces]
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + end


def answer_with(page, **response) -> None:
    """The function answers instead of the server."""
    page.unroute_all()
    page.route("**/v1/chat/completions", lambda route: route.fulfill(**response))


def test_an_answer_comes_in_pieces_and_shows_its_tokens(page, author):
    author.starts("Good ~day")
    type_in(page, "Hi\nyou")
    answer = page.locator(".turn.assistant")
    expect(answer.locator(".body")).to_have_text("Good ")
    assert page.get_by_role("button", name="Stop", exact=True).is_visible()
    prompt = render_prompt([Message("user", "Hi\nyou")], TOKENIZER)
    expect(page.locator("#used")).to_have_text(f"{len(prompt) + 5} / 1,000")
    # Typing goes on, sending does not.
    type_in(page, "not yet")
    author.may_finish.set()
    expect(answer.locator(".body")).to_have_text("Good day")
    finish(page)
    assert author.prompts == [prompt]
    assert turns(page) == ["Hi\nyou", "Good day"]
    assert page.input_value("#input") == "not yet"
    expect(page.locator("#used")).to_have_text(f"{len(prompt) + 9} / 1,000")
    expect(page.locator("#meter")).to_have_attribute("aria-valuenow", str(len(prompt) + 9))
    expect(page.locator("#status")).to_have_text("Good day")
    assert page.title() == "mine · Hamner"
    author.says("Bye")
    say(page, "And?")
    messages = [
        Message("user", "Hi\nyou"),
        Message("assistant", "Good day"),
        Message("user", "And?"),
    ]
    assert author.prompts[-1] == render_prompt(messages, TOKENIZER)


def test_who_reads_above_stays_there(page, author):
    at = page.locator("#scroll")
    author.starts("a\n\n" * 40 + "~" + "b\n\n" * 20)
    type_in(page, "Hi")
    expect(page.locator(".turn.assistant p")).to_have_count(40)
    expect(page.locator("#down")).to_be_hidden()
    at.evaluate("(node) => node.scrollTo(0, 50)")
    expect(page.locator("#down")).to_be_visible()
    author.may_finish.set()
    finish(page)
    assert page.locator(".turn.assistant p").count() == 60
    assert at.evaluate("(node) => node.scrollTop") == 50
    page.locator("#down").click()
    expect(page.locator("#down")).to_be_hidden()
    assert at.evaluate("(node) => node.scrollTop") > 500


@pytest.mark.parametrize("how", ["button", "Escape"])
def test_stop_stops_the_server_and_keeps_what_is_there(page, author, how):
    author.starts("One~" + "x" * 400)
    # A browser that stops reading has not yet closed its connection.
    author.pace, spoken = 0.01, author.spoken
    type_in(page, "Hi")
    expect(page.locator(".turn.assistant .body")).to_have_text("One")
    if how == "button":
        page.get_by_role("button", name="Stop", exact=True).click()
    else:
        page.keyboard.press("Escape")
    expect(page.locator(".note")).to_have_text("Stopped.")
    author.may_finish.set()
    # The server takes the next question only when it has left the one before.
    author.says("Two")
    say(page, "Again")
    assert turns(page) == ["Hi", "One", "Again", "Two"]
    assert author.spoken - spoken < 100


def test_a_new_answer_replaces_the_last_one(page, author):
    author.says("First", "Second", "Third")
    say(page, "Hi")
    page.get_by_role("button", name="Regenerate").click()
    expect(page.locator(".turn.assistant .body")).to_have_text("Second")
    finish(page)
    assert turns(page) == ["Hi", "Second"]
    assert author.prompts[0] == author.prompts[1]
    say(page, "More")
    assert turns(page) == ["Hi", "Second", "More", "Third"]
    assert page.get_by_role("button", name="Regenerate").count() == 1


def test_an_edited_message_replaces_what_followed(page, author):
    author.says("First", "Second", "Third")
    say(page, "One")
    say(page, "Two")
    page.get_by_role("button", name="Edit the message").first.click()
    assert page.input_value("#input") == "One"
    page.keyboard.press("Escape")
    assert (page.input_value("#input"), len(turns(page))) == ("", 4)
    page.get_by_role("button", name="Edit the message").first.click()
    say(page, "Other")
    assert turns(page) == ["Other", "Third"]
    assert author.prompts[-1] == render_prompt([Message("user", "Other")], TOKENIZER)


def test_conversations_outlast_the_page(page, author, served):
    author.says("Aye")
    say(page, "First talk")
    page.get_by_role("button", name="New chat").click()
    assert turns(page) == []
    say(page, "Second talk")
    assert titles(page) == ["Second talk", "First talk"]
    page.reload()
    expect(page.locator(".turn")).to_have_count(2)
    assert turns(page) == ["Second talk", "Aye"]
    page.get_by_role("button", name="First talk", exact=True).click()
    assert turns(page) == ["First talk", "Aye"]
    page.get_by_role("button", name="Rename First talk").click()
    page.keyboard.type("Old <b>talk</b>")
    page.keyboard.press("Enter")
    assert titles(page) == ["Second talk", "Old <b>talk</b>"]
    delete(page, "Second talk")
    assert titles(page) == ["Old <b>talk</b>"]
    page.get_by_role("button", name="Undo").click()
    assert titles(page) == ["Second talk", "Old <b>talk</b>"]
    delete(page, "Second talk")
    start(page, served[1])
    assert titles(page) == ["Old <b>talk</b>"]


def test_two_conversations_at_a_time(page, author):
    author.starts("Slow~ly")
    type_in(page, "One")
    expect(page.locator(".turn.assistant .body")).to_have_text("Slow")
    page.get_by_role("button", name="New chat").click()
    type_in(page, "Two")
    author.texts = ["Quickly"]
    author.may_finish.set()
    expect(page.locator(".turn.assistant .body")).to_have_text("Quickly")
    page.get_by_role("button", name="One", exact=True).click()
    assert turns(page) == ["One", "Slowly"]


def test_another_tab_has_the_same_conversations(page, author, served):
    other = page.context.new_page()
    start(other, served[1])
    author.says("Aye")
    say(page, "Shared")
    expect(other.locator("#list .open")).to_have_text(["Shared"])
    delete(other, "Shared")
    expect(page.locator("#list .open")).to_have_count(0)


def test_a_message_that_another_tab_removed_may_be_edited(page, author, served):
    author.says("Aye")
    for text in ("One", "Two", "Three"):
        say(page, text)
    other = page.context.new_page()
    start(other, page.url)
    other.get_by_role("button", name="Edit the message").last.click()
    page.get_by_role("button", name="Edit the message").first.click()
    say(page, "Uno")
    expect(other.locator(".turn .body")).to_have_text(["Uno", "Aye"])
    say(other, "Tres")
    other.reload()
    expect(other.locator(".turn .body")).to_have_text(["Uno", "Aye", "Tres", "Aye"])


def test_system_prompt_and_settings_reach_the_model(page, author):
    author.says("Aye")
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System prompt").fill("Be terse.")
    for label, default in (("Temperature", "0.5"), ("Repetition penalty", "auto"), ("Seed", "")):
        assert page.get_by_label(label).get_attribute("placeholder") == default
    page.get_by_label("Temperature").fill("0.33")
    page.get_by_label("Top-k").fill("7")
    page.get_by_label("Top-p").fill("2")
    expect(page.get_by_label("Top-p")).to_have_attribute("aria-invalid", "true")
    page.get_by_label("Seed").fill("5")
    page.get_by_label("Longest answer").fill("2")
    page.keyboard.press("Escape")
    say(page, "Hi")
    messages = [Message("system", "Be terse."), Message("user", "Hi")]
    assert author.prompts[-1] == render_prompt(messages, TOKENIZER)
    assert author.sampling == replace(DEFAULT, temperature=0.33, top_k=7)
    assert author.seeds[-1] == 5
    assert turns(page) == ["Hi", "Ay"]
    expect(page.locator(".note")).to_have_text(re.compile("^Cut after 2 tokens"))
    # They stay with the conversation, and for the next one.
    page.reload()
    expect(page.locator(".turn")).to_have_count(2)
    page.get_by_role("button", name="New chat").click()
    page.get_by_role("button", name="Settings").click()
    assert page.get_by_label("System prompt").input_value() == "Be terse."
    page.get_by_role("button", name="Reset to the server's").click()
    page.get_by_role("button", name="Close", exact=True).click()
    say(page, "Hi")
    assert author.prompts[-1] == render_prompt(messages[1:], TOKENIZER)
    assert author.sampling == DEFAULT


HOSTILE = [
    "<img src=x onerror=\"document.title='hacked'\">",
    "</script><script>document.title='hacked'</script>",
    '[here](javascript:alert(1)) <a href="javascript:alert(2)">there</a> ![x](http://evil.example)',
    '**<iframe srcdoc="<script>parent.document.title=1</script>">**',
    "```<b>\n</code></pre><svg onload=alert(3)>\n```",
    '- <style>body{display:none}</style>\n1. "><script>alert(4)</script>',
    "&lt;script&gt; \u202e \x00 <!-- ${alert(5)} {{constructor}}",
]


def test_what_the_model_writes_never_becomes_markup(page, author):
    for text in HOSTILE:
        author.says(text)
        say(page, text)
    tags = page.locator("#log .body *").evaluate_all(
        "(nodes) => [...new Set(nodes.map((node) => node.localName))]"
    )
    shown = {"p", "strong", "em", "code", "pre", "figure", "figcaption", "div", "ul", "ol", "li"}
    assert set(tags) <= shown | {"button", "svg", "use"}
    assert page.title() == "mine · Hamner"
    assert page.locator("body").is_visible()
    whole = " ".join(turns(page))
    for tag in ("<img", "</script>", "javascript:alert(1)", "<iframe", "<svg onload", "<style>"):
        assert whole.count(tag) >= 2
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Show Markdown").uncheck()
    page.keyboard.press("Escape")
    answers = page.locator(".turn.assistant .body").evaluate_all(
        "(nodes) => nodes.map((node) => node.textContent)"
    )
    assert answers == HOSTILE
    page.reload()
    expect(page.locator(".turn.assistant .plain")).to_have_count(len(HOSTILE))


MARKDOWN = [
    ("a\nb\n\nc", '<p class="paragraph">a\nb</p><p class="paragraph">c</p>'),
    ("**a *b* c** `d*e*`", "<strong>a <em>b</em> c</strong> <code>d*e*</code>"),
    ("***a*** __b__ _c_", "<strong><em>a</em></strong> <strong>b</strong> <em>c</em>"),
    ("snake_case_name 2 * 3 * 4 **open", "snake_case_name 2 * 3 * 4 **open"),
    (r"\*a\* `` ` `` \d", r"*a* <code>`</code> \d"),
    ("**a *b** c*", "<strong>a *b</strong> c*"),
    ("## Title\ntext", '<p class="heading">Title</p><p class="paragraph">text</p>'),
    ("- a\n- b\n  c\n\n- d", "<div><ul><li>a</li><li>b\nc</li><li>d</li></ul></div>"),
    (
        "3. a\n   - b\n   - c\n4. d\n\nend",
        '<div><ol start="3"><li>a<ul><li>b</li><li>c</li></ul></li><li>d</li></ol></div>'
        '<p class="paragraph">end</p>',
    ),
]


@pytest.fixture(scope="module")
def rendering(browser, served):
    """The function gives the markup of a text that comes in the pieces given."""
    code = """(texts) => {
        const node = document.createElement("div");
        const growing = new Growing(node, true);
        for (const text of texts) growing.show(text);
        return node.innerHTML;
    }"""
    with opened(browser, served[1]) as page:
        yield lambda *texts: page.evaluate(code, texts)


@pytest.mark.parametrize(("text", "markup"), MARKDOWN)
def test_markdown(rendering, text, markup):
    whole = rendering(text)
    assert whole in (markup, f'<p class="paragraph">{markup}</p>')
    assert rendering(*(text[:end] for end in range(len(text) + 1))) == whole


def test_code_is_shown_as_it_is(rendering):
    text = "Do:\n```python\ndef f():\n\n    return '**x**'\n```\n~~~\nopen `a`"
    whole = rendering(text)
    blocks = re.findall(r"<code>(.*?)</code></pre>", whole, re.DOTALL)
    assert blocks == ["def f():\n\n    return '**x**'", "open `a`"]
    assert re.findall(r"<figcaption>(\w+)", whole) == ["python", "text"]
    assert rendering(*(text[:end] for end in range(len(text) + 1))) == whole


BOMBS = ["*", "`", "``a`", "*a", "a*b_", "\\", "#", "# ", "```\n", "``` ", "- a\n\n", "\n\n", "* "]


def test_no_text_takes_the_page_long(page):
    """A pass that is not linear takes minutes at this size."""
    for bomb in BOMBS:
        # Deeper and deeper, too.
        text = bomb * (100_000 // len(bomb)) + "\n"
        text += "".join(" " * depth + "- a\n" for depth in range(300))
        size = page.evaluate(
            """(text) => {
                const node = document.createElement("div");
                new Growing(node, true).show(text);
                let depth = 0;
                for (let at = node; at; at = at.lastElementChild) depth += 1;
                return [node.textContent.length, depth];
            }""",
            text,
        )
        assert size[0] <= len(text)
        assert size[1] < 40


def test_a_huge_answer_is_shown_and_kept(page, author):
    text = "".join(f"Line {i} of **many**.\n\n" for i in range(3000)) + "x" * 1_200_000
    pieces = [text[i : i + 20_000] for i in range(0, len(text), 20_000)]
    answer_with(page, body=streamed(*pieces))
    say(page, "Hi")
    assert page.locator(".turn.assistant strong").count() == 3000
    page.reload()
    expect(page.locator(".turn.assistant strong")).to_have_count(3000)
    # It is more than a request may hold and than the model sees.
    page.unroute_all()
    author.says("Aye")
    say(page, "More")
    assert turns(page)[-1] == "Aye"
    assert author.prompts == [render_prompt([Message("user", "More")], TOKENIZER)]
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_server_that_is_gone_is_a_sentence(browser):
    author = Author()
    with contextlib.ExitStack() as servers, contextlib.ExitStack() as pages:
        page = pages.enter_context(opened(browser, servers.enter_context(serving(author))))
        author.says("Aye")
        say(page, "Hi")
        servers.close()
        say(page, "There?")
        expect(page.locator(".note.failed")).to_have_text(
            re.compile("^The server does not answer. See whether .* then try again.$")
        )
        answer_with(page, body=streamed("Here", " again"))
        page.get_by_role("button", name="Try again").click()
        finish(page)
        assert turns(page) == ["Hi", "Aye", "There?", "Here again"]
        assert page.locator(".note").count() == 0


def test_what_goes_wrong_with_an_answer_is_a_sentence(page):
    error = f"data: {json.dumps({'error': {'message': 'the weights are of no use'}})}\n\n"
    busy = {"error": {"message": "8 requests are waiting already; try again later"}}
    note = page.locator(".note.failed")
    for answer, shown, reason in (
        ({"body": streamed("So f", end="")}, "So f", "The answer broke off. The server"),
        ({"body": streamed("x", end=error)}, "x", "The weights are of no use."),
        # The answer before is better than none.
        ({"status": 429, "json": busy}, "x", "8 requests are waiting already; try again later."),
        ({"status": 502, "body": "<html>"}, "x", "The server answered with status 502."),
    ):
        answer_with(page, **answer)
        if page.locator(".turn").count():
            page.get_by_role("button", name="Try again").click()
            finish(page)
        else:
            say(page, "Hi")
        expect(note).to_contain_text(reason)
        assert turns(page) == ["Hi", shown]


def test_a_full_context_forgets_and_says_so(browser):
    """A real model, of 64 tokens of context, answers what the terminal would."""
    model = sharp(replace(DENSE, vocab_size=261))
    generator = Generator(model, TOKENIZER)
    with (
        serving(generator, max_new_tokens=8, seed=1) as url,
        opened(browser, url) as page,
    ):
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("Temperature").fill("0")
        page.get_by_label("Repetition penalty").fill("1")
        page.keyboard.press("Escape")
        say(page, "a" * 20)
        prompt = render_prompt([Message("user", "a" * 20)], TOKENIZER)
        greedy = Generator(model, TOKENIZER).tokens(
            prompt, Sampling(temperature=0, repetition_penalty=1), seed=0, unpenalized=()
        )
        said = TOKENIZER.decode([next(greedy) for _ in range(8)])
        shown = page.locator(".turn.assistant .body").first
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("Show Markdown").uncheck()
        page.keyboard.press("Escape")
        assert shown.evaluate("(node) => node.textContent") == said
        assert page.locator(".forgotten").count() == 0
        say(page, "b" * 20)
        expect(page.locator(".forgotten")).to_have_text(re.compile("no longer sees what is above"))
        # What is above it is the first question and its answer.
        assert page.locator(".forgotten ~ .turn").count() == 2
        say(page, "c" * 100)
        expect(page.locator(".note.failed")).to_have_text(
            re.compile(r"^The messages take \d+ tokens, the model's context is 64: shorten them\.$")
        )


def test_a_base_model_continues_the_text(browser, served_text):
    author, url = served_text
    with opened(browser, url) as page:
        author.says(" b<i>", " c", " d")
        say(page, "a")
        assert author.prompts[-1] == TOKENIZER.encode("a")
        page.press("#input", "Enter")
        finish(page)
        assert turns(page) == ["a b<i> c"]
        assert author.prompts[-1] == TOKENIZER.encode("a b<i>")
        page.get_by_role("button", name="Regenerate").click()
        expect(page.locator(".body")).to_have_text("a b<i> d")
        finish(page)
        assert author.prompts[-1] == TOKENIZER.encode("a b<i>")
        assert page.locator(".model").all_inner_texts() == [" b<i>", " d"]
        page.get_by_role("button", name="Edit").click()
        assert page.input_value("#input") == "a b<i> d"
        say(page, "x" * 90)
        assert author.prompts[-1] == TOKENIZER.encode("x" * 60)
        expect(page.locator(".note")).to_have_text(re.compile("only saw its last 60 tokens"))
        page.reload()
        expect(page.locator(".body")).to_have_text("x" * 90 + " d")
        page.get_by_role("button", name="Settings").click()
        assert not page.get_by_label("System prompt").is_visible()


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        (
            "Object.defineProperty(window, 'localStorage', {get() { throw new Error('no'); }})",
            "This browser keeps no data",
        ),
        (
            "try { for (let n = 4e6; n >= 1; n = Math.floor(n / 2)) { try {"
            " for (;;) localStorage.setItem('x' + n + Math.random(), 'x'.repeat(n));"
            " } catch {} } } catch {}",
            "storage for this page is full",
        ),
    ],
    ids=["private", "full"],
)
def test_a_browser_that_keeps_nothing_is_a_sentence(browser, served, author, script, problem):
    with opened(browser, served[1], script) as page:
        author.says("Aye")
        say(page, "One")
        page.get_by_role("button", name="New chat").click()
        say(page, "Two")
        expect(page.locator("#kept")).to_have_text(re.compile(problem))
        page.get_by_role("button", name="One", exact=True).click()
        assert turns(page) == ["One", "Aye"]


def test_what_is_kept_damaged_is_left_aside(page, author, served):
    author.says("Aye")
    say(page, "Whole")
    page.evaluate("""() => {
        const kept = ["", "{", "null", "[]", "3", '{"id": 5}', '{"id": "other", "turns": []}',
            '{"id": "k7", "turns": [{"role": "x"}]}'];
        kept.forEach((text, i) => localStorage.setItem(`hamner.chat/k${i}`, text));
        localStorage.setItem("hamner.chat/odd", JSON.stringify({id: "odd", kind: {}, title: ["<b>"],
            settings: {system: 5, temperature: "x"}, updated: null, seenFrom: "y",
            turns: [{role: "user", text: "Odd", note: {}}]}));
    }""")
    start(page, served[1])
    assert sorted(titles(page)) == ["<b>", "Whole"]
    page.get_by_role("button", name="<b>", exact=True).click()
    assert turns(page) == ["Odd"]


def test_the_keyboard_is_enough(page, author):
    author.says("Aye")
    focused = (
        "document.activeElement.getAttribute('aria-label') || document.activeElement.innerText"
    )
    assert page.evaluate("document.activeElement.id") == "input"
    page.keyboard.type("One")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("Two")
    page.keyboard.press("Enter")
    finish(page)
    assert turns(page) == ["One\nTwo", "Aye"]
    page.locator(".skip").focus()
    order = []
    for _ in range(10):
        page.keyboard.press("Tab")
        order.append(page.evaluate(focused).strip())
    assert order[:4] == ["New chat", "One Two", "Rename One Two", "Delete One Two"]
    assert order[4:7] == ["Settings", "Conversation", "Edit the message"]
    assert order[-2:] == ["Regenerate", "Message"]
    page.get_by_role("button", name="Settings").press("Enter")
    assert page.get_by_role("dialog", name="Settings of this conversation").is_visible()
    page.keyboard.press("Escape")
    assert page.evaluate(focused) == "Settings"
    nameless = page.locator("button, input, textarea").evaluate_all("""(nodes) => nodes.filter(
        (node) => node.offsetParent && !(node.getAttribute("aria-label") || node.innerText.trim()
            || node.labels?.length)).length""")
    assert nameless == 0


def test_a_phone_is_wide_enough(browser, served, author):
    with opened(browser, served[1], has_touch=True) as page:
        page.set_viewport_size({"width": 360, "height": 640})
        wide = "x" * 90
        author.says(f"{wide}\n\n`{wide}`\n\n- {wide}\n\n```\n{wide}\n```")
        say(page, wide)
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        assert page.locator("#scroll").evaluate("(node) => node.scrollWidth <= node.clientWidth")
        assert page.locator("#input").bounding_box()["width"] > 240
        page.get_by_role("button", name="Conversations").click()
        assert page.evaluate("document.activeElement.id") == "close-side"
        assert page.get_by_role("button", name="New chat").is_visible()
        # A phone's browser enlarges the page for a field of smaller letters.
        page.get_by_role("button", name=f"Rename {wide[:60]}").click()
        name = page.get_by_label("Name of the conversation")
        assert name.evaluate("(node) => getComputedStyle(node).fontSize") == "16px"
        name.press("Escape")
        page.keyboard.press("Escape")
        expect(page.get_by_role("button", name="New chat")).to_be_hidden()
        # The input would open the phone's keyboard over what is to be read.
        page.get_by_role("button", name="Regenerate").click()
        finish(page)
        assert page.evaluate("document.activeElement.id") == "scroll"
        page.get_by_role("button", name="Conversations").click()
        page.get_by_role("button", name=wide[:60], exact=True).click()
        assert page.evaluate("document.activeElement.id") == "scroll"
        page.get_by_role("button", name="Conversations").click()
        page.get_by_role("button", name="New chat").click()
        assert page.evaluate("document.activeElement.id") == "input"


def test_light_and_dark(page):
    for scheme, is_dark in (("light", False), ("dark", True)):
        page.emulate_media(color_scheme=scheme)
        color = page.locator("body").evaluate("(node) => getComputedStyle(node).backgroundColor")
        assert (max(int(level) for level in re.findall(r"\d+", color)) < 64) == is_dark


def test_the_page_of_a_stranger_cannot_use_the_server(page, author, served):
    """It is on the same machine, where browsers forbid less than to the pages of others."""
    url = served[1]
    author.says("Secret")
    stranger = page.context.new_page()
    stranger.route(
        "http://127.0.0.1:1/", lambda route: route.fulfill(body="<p>", content_type="text/html")
    )
    stranger.goto("http://127.0.0.1:1/")
    outcomes = stranger.evaluate(
        """async (url) => {
            const body = JSON.stringify({messages: [{role: "user", content: "Hi"}]});
            const json = {"content-type": "application/json"};
            const tries = [
                [url + "/v1/models"],
                [url + "/v1/models", {mode: "no-cors"}],
                [url + "/"],
                [url + "/v1/chat/completions", {method: "POST", body, headers: json}],
                [url + "/v1/chat/completions", {method: "POST", body, mode: "no-cors"}],
            ];
            const outcomes = [];
            for (const [path, options] of tries) {
                try {
                    outcomes.push((await (await fetch(path, options)).text()) || "empty");
                } catch (error) {
                    outcomes.push("refused");
                }
            }
            const frame = document.createElement("iframe");
            frame.src = url;
            document.body.append(frame);
            await new Promise((resolve) => { frame.onload = resolve; });
            return outcomes;
        }""",
        url,
    )
    assert set(outcomes) <= {"refused", "empty"}
    assert author.prompts == []
    assert [frame.url for frame in stranger.frames[1:]] == ["chrome-error://chromewebdata/"]


def test_the_page_of_a_name_that_points_here_learns_no_system_prompt(browser):
    """The server's own page, opened under it, says what to open instead."""
    author = Author()
    with (
        serving(author, serve=0, host="0.0.0.0", system="Be secret.") as url,
        opened(browser, url.replace("127.0.0.1", STRANGER)) as page,
    ):
        listed = page.evaluate("async () => await (await fetch('/v1/models')).text()")
        assert "mine" in listed
        assert "secret" not in listed
        page.get_by_role("button", name="Settings").click()
        assert page.get_by_label("System prompt").input_value() == ""
        page.keyboard.press("Escape")
        say(page, "Hi")
        expect(page.locator(".note.failed")).to_contain_text("by the address of its machine")
        assert author.prompts == []
