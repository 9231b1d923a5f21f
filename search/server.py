"""The page's server: what a browser asks for, and what it is answered. The page itself is in search/page/.

A picture is named by a key (`search.gallery.Gallery.key_of`), so no request can name a file. What is uploaded is kept in memory
only.
"""

import asyncio
import ipaddress
import secrets
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from search.gallery import Filters
from search.queries import best_captions, best_matches, blend, classify_embedding, embed_query, judge, probably_nothing
from utils.errors import UserError
from utils.files import read_bytes
from utils.formats import decode
from utils.images import center_crop, read_image
from utils.memory import release_memory

PAGE = Path(__file__).parent / "page"
PAGE_FILES = {"index.html": "text/html", "page.css": "text/css", "page.js": "text/javascript"}  # and their types
NUM_SHOWN = 24  # matches at once; more come when the page is scrolled
TILE_PIXELS, LARGE_PIXELS = 320, 1600  # shorter side of a tile; longer side of a large picture
MAX_UPLOAD = 20_000_000  # bytes
MAX_BODIES, MAX_WAITING = 4, 100  # uploads that are received at once, and that wait for that
UPLOAD_SECONDS = 60  # in which an upload must have come
LARGE = 8_000_000  # pixels; after a picture that has more, memory is given back
MAX_CLASSES = 50
MAX_DECODING = 2  # pictures at once; a large one takes much memory
NUM_QUERIES, NUM_TILES, NUM_UPLOADS = 500, 1000, 100  # that are kept in memory
RUN_PICTURES = "curves.png", "relevance.png"  # of the run folder, that the page shows
CACHED = {"Cache-Control": "max-age=3600"}
POLICY = {  # nothing from elsewhere, and no scripts within what is shown
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; frame-ancestors 'self'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
MAP_POLICY = POLICY | {  # the map is one file, with its own script and style in it
    "Content-Security-Policy": "default-src 'none'; img-src 'self' data:; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; frame-ancestors 'self'; base-uri 'none'"
}


class Page:
    """Answers the page's requests about a `search.live.LiveGallery`."""

    def __init__(self, searcher, live):
        self.searcher, self.live, self.uploads, self.jobs = searcher, live, OrderedDict(), {}
        self.lock, self.decoding = threading.Lock(), threading.BoundedSemaphore(MAX_DECODING)
        # One thread: a large picture takes gigabytes while it is decoded, and torch keeps memory for each thread.
        self.embedder = ThreadPoolExecutor(1)
        self.receiving, self.num_waiting = asyncio.Semaphore(MAX_BODIES), 0
        self.embed = lru_cache(NUM_QUERIES)(lambda text, minus: embed_query(searcher, [text], [minus] if minus else []))
        self.tile = lru_cache(NUM_TILES)(lambda path, key: draw_tile(path))  # a changed file gets another key

    # ---- searching -------------------------------------------------------------------------------------------------

    def status(self, request):
        live = self.live
        return JSONResponse(
            {
                "run": self.searcher.run,
                "pictures": len(live.gallery.paths) if live.gallery else 0,
                "total": live.total,
                "working": live.working,
                "problem": live.problem,
                "notes": live.notes(),
                "files": [name for name in RUN_PICTURES if self.searcher.is_folder and Path(self.searcher.run, name).exists()],
            }
        )

    def search(self, request):
        """Matches of words, of a picture, or of both. Parameters: q, minus, like (a key) or upload, filters, page, floor."""
        value = request.query_params
        gallery, embeddings = self.require_gallery(), []
        text, minus = value.get("q", "").strip(), value.get("minus", "").strip()
        if text:
            embeddings.append(self.embed(text, minus))
        elif minus:
            raise UserError("say what the pictures should show, besides what they should not")
        if value.get("like") or value.get("upload"):
            embeddings.append(self.picture_embedding(gallery, value))
        if not embeddings:
            raise UserError("say what to look for: words, or a picture")
        gallery = gallery.select(Filters(*(value.get(name, "").strip() for name in ("after", "before", "folder"))))
        embedding, page = blend(gallery, embeddings), number(value, "page")
        found = best_matches(gallery, embedding, range(len(gallery.rows)), NUM_SHOWN, page * NUM_SHOWN)
        matches = judge(found, self.searcher, text if len(embeddings) == 1 and not minus else "", embedding)
        records = [self.record(gallery, match) for match in matches]
        return JSONResponse(
            {
                "matches": [r for r in records if r],
                "more": len(found) == NUM_SHOWN,
                "of": len(gallery.rows),
                "nothing": page == 0 and probably_nothing(matches),
            }
        )

    def record(self, gallery, match):
        """What the page shows of a match, whose filename is a position; None where it was deleted meanwhile."""
        path = gallery.paths[match.filename]
        if path is None:
            return None
        key, name = gallery.key_of(match.filename), self.below_folder(path)
        return {"key": key, "name": name, "label": match.label().strip(), "likely": match.is_likely}

    def below_folder(self, path):
        folder = Path(self.live.folder).absolute() if self.live.folder else None
        return str(Path(path).relative_to(folder)) if folder and Path(path).is_relative_to(folder) else Path(path).name

    def picture_embedding(self, gallery, value):
        if value.get("upload"):
            return self.uploaded(value)
        position = gallery.position_of(value["like"])
        if position is None:
            raise UserError("this picture is no longer there")
        return gallery.embedding_of(position)

    def uploaded(self, value):
        embedding = self.uploads.get(value.get("upload", ""))
        if embedding is None:
            raise UserError("this picture is no longer in memory; drop it again")
        return embedding

    def require_gallery(self):
        gallery = self.live.gallery
        if gallery is None:
            raise UserError(self.live.problem or "no picture is embedded yet; wait a moment")
        return gallery

    # ---- a picture from outside ------------------------------------------------------------------------------------

    async def upload(self, request):
        """Embeds the picture that is the request's body. Answers with a key for it and its best captions.

        A few are received at once, and others wait, so that their bytes do not fill the memory; beyond that they get 503.
        """
        if self.num_waiting >= MAX_WAITING:
            raise HTTPException(503, "too many pictures at once; try again in a moment")
        self.num_waiting += 1
        try:
            async with self.receiving:
                contents, name = await receive_picture(request), request.query_params.get("name", "picture")
                embedding = await asyncio.get_running_loop().run_in_executor(
                    self.embedder, self.searcher.embed_picture, contents, Path(name).name
                )
                contents = None
        finally:
            self.num_waiting -= 1
            release_memory()
        key = secrets.token_urlsafe(12)
        self.uploads[key] = embedding
        while len(self.uploads) > NUM_UPLOADS:
            self.uploads.popitem(last=False)
        return JSONResponse({"upload": key, "captions": self.best_captions(embedding)})

    def best_captions(self, embedding):
        texts, embeddings = self.live.captions
        if not texts:
            return []
        found = best_captions(texts, embeddings, embedding)
        return [{"caption": caption, "score": f"{score:.2f}"} for caption, score in found]

    def classify(self, request):
        value = request.query_params
        names = [name.strip() for name in value.get("names", "").replace("\n", ",").split(",") if name.strip()]
        if not 2 <= len(names) <= MAX_CLASSES:
            raise UserError(f"name at least two classes, and at most {MAX_CLASSES}, with commas between them")
        embedding = self.picture_embedding(self.require_gallery(), value) if value.get("like") else self.uploaded(value)
        classes = classify_embedding(self.searcher.model, embedding, names)
        return JSONResponse({"classes": [{"name": name, "probability": probability} for name, probability in classes]})

    # ---- a picture of the gallery ----------------------------------------------------------------------------------

    def located(self, request):
        """(gallery, position, path) of the picture with a key. Raises HTTPException for any other text."""
        gallery = self.live.gallery
        position = gallery.position_of(request.path_params["key"]) if gallery else None
        path = None if position is None else gallery.paths[position]
        if path is None:
            raise HTTPException(404, "no such picture")
        return gallery, position, path

    def picture(self, request):
        """A picture as a JPEG: a tile, or large."""
        (_, _, path), large = self.located(request), "large" in request.query_params
        try:
            with self.decoding:
                contents = draw_large(path) if large else self.tile(path, request.path_params["key"])
        except (OSError, ValueError):  # deleted or changed since it was embedded
            raise HTTPException(404, "no such picture") from None
        return Response(contents, media_type="image/jpeg", headers=CACHED)

    def details(self, request):
        gallery, position, path = self.located(request)
        date, captions = gallery.store.date_of(path), self.best_captions(gallery.embedding_of(position))
        return JSONResponse({"path": path, "date": date and date.replace("T", " "), "captions": captions})

    def heat(self, request):
        """The centre of a picture with a heat map of what matches the words of q."""
        from search.occlusion import heat_map

        (_, _, path), text = self.located(request), request.query_params.get("q", "").strip()
        if not text:
            raise UserError("a heat map shows what matches words; search for some")
        with self.decoding:
            contents = encode(heat_map(self.searcher, self.embed(text, ""), path, TILE_PIXELS))
        return Response(contents, media_type="image/jpeg", headers=CACHED)

    # ---- the whole gallery -----------------------------------------------------------------------------------------

    def duplicates(self, request):
        """Groups of the same photograph, once they are found."""

        def find(gallery):
            from search.duplicates import find_duplicates

            key, files = {}, []
            for row, path, size, changed in gallery.store.files():
                name = f"{gallery.generation}-{row}"
                if gallery.position_of(name) is not None:  # the store may have other folders' pictures, too
                    key[path] = name
                    files.append((path, size, changed))
            return [
                [{"key": key[copy.path], "name": self.below_folder(copy.path), "label": copy.label()} for copy in group]
                for group in find_duplicates(files, self.searcher.cache_dir, 1)
            ]

        groups = self.job("duplicates", find)
        return JSONResponse({"working": groups is None, "groups": groups})

    def map(self, request):
        """The map of the gallery, or 503 while it is drawn."""

        def draw(gallery):
            from search.map import map_pictures, page

            paths, (captions, vectors) = list(gallery.paths), self.live.captions
            pictures = map_pictures(gallery.embeddings(), paths, captions, vectors[:, :-1], 1)
            key = {path: gallery.key_of(position) for position, path in enumerate(paths)}
            return page(pictures, lambda path: f"/picture/{key[path]}?large")

        html = None if self.live.captions[1] is None else self.job("map", draw)
        if html is None:
            raise HTTPException(503, "wait")
        return HTMLResponse(html, headers=MAP_POLICY)

    def job(self, name, function):
        """What function(gallery) gives for the gallery as it is now; None until a thread has it.

        None also while pictures are embedded. Raises UserError where it failed.
        """
        gallery = self.require_gallery()
        with self.lock:
            known = self.jobs.get(name)
            outdated = known is not None and known["gallery"] is not gallery and not known["running"]
            if known is None or outdated:
                if self.live.working:
                    return None
                known = self.jobs[name] = {"gallery": gallery, "running": True, "result": None, "error": None}
                threading.Thread(target=run_job, args=(known, function), daemon=True).start()
        if known["error"]:
            raise UserError(known["error"])
        return known["result"]

    def run_file(self, request):
        name = request.path_params["name"]
        if name not in RUN_PICTURES or not self.searcher.is_folder or not Path(self.searcher.run, name).exists():
            raise HTTPException(404, "no such file")
        return Response(Path(self.searcher.run, name).read_bytes(), media_type="image/png")


async def receive_picture(request):
    """The body of a request. Raises UserError where it is too large, HTTPException where it does not come."""
    contents = bytearray()
    try:
        async with asyncio.timeout(UPLOAD_SECONDS):
            async for chunk in request.stream():
                contents += chunk
                if len(contents) > MAX_UPLOAD:
                    raise UserError(f"the picture has more than {MAX_UPLOAD // 1_000_000} MB; scale it down")
    except TimeoutError:
        raise HTTPException(408, f"the picture did not come within {UPLOAD_SECONDS} s; try again") from None
    except ClientDisconnect:
        raise HTTPException(400, "the picture did not come as a whole") from None
    return contents


def number(value, name):
    """A number in a request; 0 where it is left out. Raises UserError for another text."""
    text = value.get(name, "0")
    if not text.isdecimal() or len(text) > 12:
        raise UserError(f"{name} {text[:20]!r}: is no number")
    return int(text)


def run_job(job, function):
    """Runs what a `Page.job` is about. Any error is kept, so that the page can show it."""
    try:
        job["result"] = function(job["gallery"])
    except Exception as error:
        job["error"] = str(error) or type(error).__name__
    finally:
        job["running"] = False


def draw_tile(path):
    picture = read_image(path, TILE_PIXELS)
    return encode(picture if picture.shape[0] < 2 * picture.shape[1] else center_crop(picture, TILE_PIXELS))


def draw_large(path):
    picture = decode(read_bytes(path), Path(path).suffix)
    num_pixels, scale = picture.shape[0] * picture.shape[1], LARGE_PIXELS / max(picture.shape[:2])
    if scale < 1:
        shape = [max(1, round(side * scale)) for side in (picture.shape[1], picture.shape[0])]
        picture = cv2.resize(picture, shape, interpolation=cv2.INTER_AREA)
    if num_pixels > LARGE:
        release_memory()
    return encode(picture)


def encode(picture):
    return cv2.imencode(".jpg", np.ascontiguousarray(picture[..., ::-1]), [cv2.IMWRITE_JPEG_QUALITY, 88])[1].tobytes()


def page_file(request):
    """A file of the page itself."""
    name = request.path_params.get("name", "index.html")
    if name not in PAGE_FILES:
        raise HTTPException(404, "no such file")
    headers = POLICY | {"Cache-Control": "no-cache"}  # else a browser may mix those of two versions
    return Response((PAGE / name).read_bytes(), media_type=PAGE_FILES[name], headers=headers)


def error_response(request, error):
    """Turns an error into an answer in JSON."""
    status = error.status_code if isinstance(error, HTTPException) else 400
    return JSONResponse({"error": error.detail if isinstance(error, HTTPException) else str(error)}, status)


class KnownHostsOnly:
    """Refuses requests under another name than this machine's: a website may have led its own one here (DNS rebinding).

    An address of numbers cannot be led elsewhere, so all are accepted. hosts: names, without ports.
    """

    def __init__(self, app, hosts):
        self.app, self.hosts = app, {host.lower() for host in hosts}

    async def __call__(self, scope, receive, send):
        if scope["type"] == "http" and not self.is_known(dict(scope["headers"]).get(b"host", b"").decode("latin-1")):
            message = "refused: this page is asked for under another name; open the address that app.py printed"
            return await JSONResponse({"error": message}, 400)(scope, receive, send)
        await self.app(scope, receive, send)

    def is_known(self, host):
        name = host.strip().lower()
        if not name.endswith("]"):  # an IPv6 address without port
            before, colon, port = name.rpartition(":")
            name = before if colon and port.isdecimal() else name
        name = name.rstrip(".")
        try:
            ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
        except ValueError:
            return name in self.hosts
        return True


class OwnSiteOnly:
    """Refuses what another website's page asks for in a person's browser, but for a link to the page itself."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        headers = dict(scope.get("headers", ()))
        if headers.get(b"sec-fetch-site") == b"cross-site" and scope["path"] != "/":
            await JSONResponse({"error": "refused: another website asked for this"}, 403)(scope, receive, send)
        else:
            await self.app(scope, receive, send)


def build_app(searcher, live, hosts):
    """The web application. hosts: names under which it may be asked; any other is refused, as other pages could use it."""
    page = Page(searcher, live)
    routes = [
        Route("/", page_file),
        Route("/static/{name}", page_file),
        Route("/api/status", page.status),
        Route("/api/search", page.search),
        Route("/api/upload", page.upload, methods=["POST"]),
        Route("/api/classify", page.classify),
        Route("/api/duplicates", page.duplicates),
        Route("/api/picture/{key}", page.details),
        Route("/picture/{key}", page.picture),
        Route("/heat/{key}", page.heat),
        Route("/map", page.map),
        Route("/run/{name}", page.run_file),
    ]
    return Starlette(
        routes=routes,
        middleware=[Middleware(KnownHostsOnly, hosts=hosts), Middleware(OwnSiteOnly)],
        exception_handlers={UserError: error_response, HTTPException: error_response},
    )
