"""A page to search pictures with, on this machine alone: python -m tools.serve INDEX."""

from __future__ import annotations

import argparse
import html
import os
import shutil
import tempfile
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np

from lib.data.images import decode
from lib.errors import InputError
from lib.flags import Parser
from lib.program import program, run_program
from lib.retrieval.evidence import gather_evidence
from lib.retrieval.search import Searcher
from lib.retrieval.sheets import pair_sheet, require_matplotlib
from lib.retrieval.shortlist import KINDS
from tools.opened import Opened, add_checkpoint_flags, open_searcher, query_batch

EXAMPLES = ("a man in an orange hat", "two dogs on the grass", "a child plays in the snow")
MOST_LETTERS = 2000
THUMBNAIL = 320
MOST_SHOWN = 100
# the page may load nothing from elsewhere, whatever the page's library asks for
POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; connect-src 'self' data: blob:; "
    "font-src 'self' data:; frame-ancestors 'self'; form-action 'self'; base-uri 'self'"
)
STYLE = """
footer {display: none !important}
#said {min-height: 1.6em}
#found .grid-wrap {max-height: none !important; overflow: visible !important}
.gradio-container {max-width: 1200px !important; margin: auto}
@media (max-width: 700px) {
  #found .grid-container {grid-template-columns: repeat(2, minmax(0, 1fr)) !important}
  .gradio-container .row {flex-wrap: wrap}
  .gradio-container, .gradio-container * {min-width: 0 !important}
}
"""
# when the heat map is drawn and the page has its length
SCROLL = """() => {setTimeout(() => document.getElementById('hint').scrollIntoView(), 400)}"""


@program
def main(argv: Sequence[str] | None = None) -> int:
    """Serve the page until it is stopped; return the exit code."""
    args = parser().parse_args(argv)
    require_gradio()
    require_matplotlib()
    searcher, opened = open_searcher(args)
    files = tempfile.mkdtemp(prefix="search-page-")
    os.environ["GRADIO_TEMP_DIR"] = files  # what gradio may hand out lies there, and nowhere else
    try:
        serve(Page(searcher, opened), args)
    finally:
        shutil.rmtree(files, ignore_errors=True)
    return 0


def parser() -> Parser:
    """Return the parser of the command line."""
    whole = Parser("tools.serve", description=__doc__)
    whole.add_argument("index", metavar="INDEX", help="made by python -m tools.search index")
    whole.add_argument("--port", type=int, default=7860, help="on 127.0.0.1")
    whole.add_argument(
        "--example", nargs="+", default=list(EXAMPLES), metavar="TEXT", help="queries to click on"
    )
    whole.add_argument("--faiss", default="auto", choices=KINDS, help="kind of shortlist")
    add_checkpoint_flags(whole, required=False)
    return whole


def require_gradio() -> Any:
    """Return the module, its telemetry off. Raises InputError where it is not installed."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    try:
        import gradio  # an optional part, and slow to import
    except ImportError as error:
        raise InputError(
            f"no page without gradio ({error}): python -m pip install gradio"
        ) from None
    return gradio


class Page:
    """What the page asks for; the queue calls it for one user at a time."""

    def __init__(self, searcher: Searcher, opened: Opened) -> None:
        self.searcher = searcher
        self.opened = opened

    def search(self, text: str, top: float) -> tuple[list, str, list, None, str]:
        """Return gallery, what is said, the state of this user, no heat map, no hint."""
        text = " ".join(str(text or "").split())[:MOST_LETTERS]
        if not text:
            return [], said("Type what you look for."), [], None, ""
        try:
            batch = query_batch(self.opened, text)
        except InputError:
            return [], said(f"No match: the model knows no word of “{text}”."), [], None, ""
        try:
            hits = self.searcher.find(batch, int(min(max(top or 1, 1), MOST_SHOWN)))
        except InputError:  # its shards were given back, or can't be read
            return [], said("The index was changed meanwhile: start the page again."), [], None, ""
        gallery = [(self.thumbnail(one.picture), f"{one.score:.3f}  {one.path}") for one in hits]
        told = f"{len(hits)} of {len(self.searcher.index)} pictures for “{text}”"
        if batch.lengths[0] == self.opened.args.max_word:
            told += f"; it was cut to its first {self.opened.args.max_word} word pieces"
        state = [[text, one.picture, one.path] for one in hits]
        return gallery, said(told), state, None, "Click a picture to see what each word matched."

    def explain(self, state: list, place: int) -> tuple[np.ndarray | None, str]:
        """Return the heat maps of a picture that was found, and a sentence."""
        if not 0 <= place < len(state):
            return None, "That picture is not among the results any more: search again."
        text, picture, path = state[place]
        try:
            if self.searcher.index.pictures[picture].path != path:
                raise IndexError
            file = str(self.searcher.index.file(picture))
            dense = self.searcher.index.dense_texts(np.array([picture]))
            image = self.opened.photo(file, dense and dense[0])
        except (IndexError, InputError, OSError):
            return None, f"{path} can't be read any more: index the folder again."
        (evidence,) = gather_evidence(
            self.opened.model,
            image.to(self.opened.device),
            self.opened.captions([text]).to(self.opened.device),
            cv2.cvtColor(decode(file), cv2.COLOR_BGR2RGB),
            [text],
            [self.opened.words(text)],
        )
        told = f"Which patches of {path} each word matched, the best three in boxes."
        return pair_sheet(evidence).render(), evidence.note or told

    def thumbnail(self, picture: int) -> np.ndarray:
        """Return a picture of the index, small; grey where its file is gone."""
        pixels = decode(str(self.searcher.index.file(picture)))
        if pixels is None:
            return np.full((THUMBNAIL, THUMBNAIL, 3), 200, np.uint8)
        scale = min(1.0, THUMBNAIL / max(pixels.shape[:2]))
        size = max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale))
        small = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
        return cv2.cvtColor(small, cv2.COLOR_BGR2RGB)


def said(text: str) -> str:
    """Return text as HTML that shows it, whatever it holds."""
    return f"<div>{html.escape(text)}</div>"


def build(page: Page, examples: Sequence[str]) -> Any:
    """Return the gradio page: a box, a grid, and what is seen in the picture that is clicked."""
    gradio = require_gradio()
    with gradio.Blocks(title="Search pictures", analytics_enabled=False) as blocks:
        gradio.Markdown("# Search pictures")
        with gradio.Row():
            box = gradio.Textbox(
                label="What is in the picture?", scale=4, elem_id="query", max_length=MOST_LETTERS
            )
            top = gradio.Number(12, label="how many", precision=0, minimum=1, maximum=MOST_SHOWN)
            button = gradio.Button("Search", variant="primary", elem_id="search", scale=1)
        gradio.Examples([[one] for one in examples], [box], label="for example")
        told = gradio.HTML(elem_id="said")
        state = gradio.State([])
        gallery = gradio.Gallery(
            label="found",
            show_label=False,  # it would lie on the first picture
            columns=4,
            height="auto",
            object_fit="contain",
            elem_id="found",
            allow_preview=False,
            buttons=[],
        )
        hint = gradio.Textbox(show_label=False, container=False, interactive=False, elem_id="hint")
        heat = gradio.Image(
            label="words and patches",
            show_label=False,
            elem_id="heat",
            interactive=False,
            buttons=["download", "fullscreen"],
        )

        def clicked(state, event):
            return page.explain(state, int(event.index))

        clicked.__annotations__["event"] = gradio.SelectData  # how gradio knows what to pass

        outputs = [gallery, told, state, heat, hint]
        one = {"concurrency_limit": 1, "concurrency_id": "model", "api_name": False}
        gradio.on([button.click, box.submit], page.search, [box, top], outputs, **one)
        shown = gallery.select(clicked, [state], [heat, hint], **one)
        shown.then(None, js=SCROLL)  # it lies below the pictures
    return blocks.queue(max_size=64)


def serve(page: Page, args: argparse.Namespace) -> None:
    """Serve the page on loopback until Ctrl-C."""
    import uvicorn  # comes with gradio

    if not 0 < args.port < 65536:
        raise InputError(f"--port {args.port}: give a number from 1 to 65535")
    app = application(build(page, args.example))
    print(f"http://127.0.0.1:{args.port} shows {len(page.searcher.index)} pictures; Ctrl-C ends it")
    config = uvicorn.Config(app, host="127.0.0.1", port=args.port, log_level="warning")
    server = uvicorn.Server(config)
    try:
        server.run()
    except SystemExit:
        raise InputError(f"--port {args.port} is taken: give another one") from None


def application(blocks: Any) -> Any:
    """Return the web application: the page, behind rules that no answer can escape."""
    import gradio
    from fastapi import FastAPI
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    # another site that points its name at this machine is refused
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])

    @app.middleware("http")
    async def guarded(request, call_next):
        answer = await call_next(request)
        answer.headers["Content-Security-Policy"] = POLICY
        answer.headers["X-Content-Type-Options"] = "nosniff"
        answer.headers["Referrer-Policy"] = "no-referrer"
        return answer

    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    return gradio.mount_gradio_app(
        app,
        blocks,
        path="",
        server_name="127.0.0.1",
        allowed_paths=[],
        show_error=True,
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        footer_links=[],
        theme=gradio.themes.Default(**fonts),
        css=STYLE,
    )


if __name__ == "__main__":
    run_program(main)
