"""A gallery that is searched while its pictures are still being embedded, and that follows its folder."""

import os
import sqlite3
import threading
import time

from search.gallery import open_store, read_gallery, update_store
from search.run_data import embed_captions
from utils.errors import UserError
from utils.folders import may_be_picture

QUIET = 500  # milliseconds without a further change, after which changes are taken in
WORK_PER_LOOK = 10  # embed for at least so many times as long as the last reading of the gallery took
LOOK_EVERY = 2000  # milliseconds after which the watcher checks whether to stop


class LiveGallery:
    """A `search.gallery.Gallery` that a thread keeps up to date.

    list_files: a function that gives the files, as for `search.gallery.open_gallery`. folder: that is watched; empty: none.

    Attributes: gallery, a `search.gallery.Gallery`, or None while it has no pictures; total, the number of files; working,
    whether some are still to be embedded; problem, a message, or empty; captions, (texts, embeddings) of the run.
    """

    def __init__(self, searcher, list_files, folder="", num_workers=4):
        self.searcher, self.list_files, self.folder, self.num_workers = searcher, list_files, folder, num_workers
        self.gallery, self.total, self.working, self.problem, self.captions = None, 0, True, "", ([], None)
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self.run_thread, daemon=True)

    def run_thread(self):
        """What the thread does. An error ends it, and is shown on the page."""
        try:
            self.follow()
        except Exception as error:  # of any kind: a full cache, no memory, a folder that cannot be watched
            self.problem = f"changes are no longer followed: {error}"
            print(self.problem, flush=True)
        self.working = False

    def follow(self):
        """Embeds what is new, then waits for changes, until it is stopped."""
        self.update()
        self.captions = embed_captions(self.searcher)
        self.searcher.save_text_encoder()
        if self.folder:
            import watchfiles  # only here: a run's own pictures do not change

            def is_picture(_, path):  # or a folder, of which there may be nothing left but its name
                return may_be_picture(os.path.basename(path)) or os.path.isdir(path)

            options = {"stop_event": self.stopped, "step": QUIET, "yield_on_timeout": True, "rust_timeout": LOOK_EVERY}
            first = True
            for changes in watchfiles.watch(self.folder, watch_filter=is_picture, **options):
                if changes or first:  # also what changed before the folder was watched
                    self.update()
                first = False

    def update(self):
        """Makes the gallery what the folder is now."""
        self.working = True
        try:
            store = open_store(self.searcher.gallery_path(), self.searcher.width)

            next_look = 0

            def show(count):
                nonlocal next_look
                self.total, started = count, time.monotonic()
                if started >= next_look:  # reading a large gallery takes a while
                    found = read_gallery(store, self.folder, exact=True)
                    self.gallery = found if len(found.rows) else None
                    next_look = time.monotonic() + WORK_PER_LOOK * (time.monotonic() - started)

            update_store(store, self.searcher, self.list_files(), self.folder, self.num_workers, show)
            found = read_gallery(store, self.folder, exact=False)
            self.gallery, self.problem = found if len(found.rows) else None, ""
            self.searcher.note_use(store.path, store.companion(".vectors"))
        except (UserError, OSError, sqlite3.Error, ValueError) as error:
            self.problem = str(error)
            print(self.problem, flush=True)
        self.working = False

    def stop(self):
        self.stopped.set()
