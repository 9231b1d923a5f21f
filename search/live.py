"""A gallery that is searched while its pictures are still being embedded, and that follows its folder."""

import os
import threading
import time

from search.files import NoPictures
from search.gallery import open_store, read_gallery, update_store
from search.run_data import embed_captions
from utils.errors import UserError
from utils.folders import may_be_picture, printable
from utils.memory import release_memory

QUIET = 500  # milliseconds without a further change, after which changes are taken in
WORK_PER_LOOK = 10  # embed for at least so many times as long as the last reading of the gallery took
LOOK_EVERY = 2000  # milliseconds after which the watcher checks whether to stop
RETRY = 10  # seconds after which what failed is tried again


class Stopped(Exception):
    """The page ends while captions are embedded."""


class LiveGallery:
    """A `search.gallery.Gallery` that a thread keeps up to date. Another embeds the run's captions, once pictures are there.

    list_files: a function that gives the files, as for `search.gallery.open_gallery`. folder: that is watched; empty: none.

    Attributes: gallery, a `search.gallery.Gallery`, or None while it has no pictures; total, the number of files; working,
    whether some are still to be embedded; problem, what could not be done, or empty; left_out, how many files cannot be read;
    captions, (texts, embeddings) of the run; captions_note, how far these are, or why there are none.
    """

    def __init__(self, searcher, list_files, folder="", num_workers=4):
        self.searcher, self.list_files, self.folder, self.num_workers = searcher, list_files, folder, num_workers
        self.gallery, self.total, self.working, self.problem, self.captions = None, 0, True, "", ([], None)
        self.left_out, self.captions_note, self.try_again_at, self.unread = 0, "", 0.0, 0
        self.stopped, self.busy = threading.Event(), threading.Lock()
        self.thread = threading.Thread(target=self.run_thread, daemon=True)
        self.captions_thread = threading.Thread(target=self.add_captions, daemon=True)

    def run_thread(self):
        """What the thread does until it is stopped. Whatever fails is shown on the page, and tried again."""
        while not self.stopped.is_set():
            try:
                self.follow()
                return
            except Exception as error:  # of any kind: the system has no watches left, the folder is gone
                self.report(f"changes are seen every {RETRY} seconds only: {reason(error)}")
            self.stopped.wait(RETRY)

    def report(self, problem):
        """Shows on the page what could not be done, and prints it once."""
        if problem and problem != self.problem:
            print(printable(problem), flush=True)
        self.problem = problem

    def follow(self):
        """Embeds what is new, then waits for changes, until it is stopped."""
        self.update()
        if self.captions_thread.ident is None:  # not yet started
            self.captions_thread.start()
        if self.folder and os.path.isdir(self.folder):
            import watchfiles  # only here: a run's own pictures do not change

            def is_picture(_, path):  # or a folder, of which there may be nothing left but its name
                return may_be_picture(os.path.basename(path)) or os.path.isdir(path)

            watched = identity(self.folder)
            options = {"stop_event": self.stopped, "step": QUIET, "yield_on_timeout": True, "rust_timeout": LOOK_EVERY}
            first = True
            for changes in watchfiles.watch(self.folder, watch_filter=is_picture, **options):
                if changes or first or self.is_retry_due():  # first: what changed before the folder was watched
                    self.update()
                first = False
                if identity(self.folder) != watched:  # gone, or another one in its place, which is then watched
                    self.update()
                    break
        while not self.stopped.wait(LOOK_EVERY / 1000):
            if self.folder and os.path.isdir(self.folder):
                return self.follow()
            went = self.folder and self.gallery is not None  # since the pictures were last looked at
            if went or self.is_retry_due():
                self.update()

    def is_retry_due(self):
        return (self.problem or self.unread) and time.monotonic() >= self.try_again_at

    def update(self):
        """Makes the gallery what the folder is now. What fails is reported, and tried again later."""
        self.working = True
        try:
            with self.busy:
                self.take_in_changes()
            self.report("")
        except NoPictures as error:
            self.gallery, self.total, self.left_out, self.unread = None, 0, 0, 0
            self.report(str(error))
        except UserError as error:
            self.report(str(error))
        except Exception as error:  # of any kind: a damaged or full cache, no memory, what the model or a library throws
            self.report(f"some pictures could not be embedded ({reason(error)}); this is tried again")
        if self.folder and not os.path.exists(self.folder):
            self.gallery, self.total, self.left_out = None, 0, 0
        self.try_again_at = time.monotonic() + RETRY
        self.working = False
        release_memory()

    def take_in_changes(self):
        """Embeds what is new and forgets what is gone. Raises what went wrong."""
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
        self.gallery = found if len(found.rows) else None
        self.left_out, self.unread = len(store.undecoded()), store.count_stale()
        self.searcher.note_use(store.path, store.companion(".vectors"))

    def add_captions(self):
        """What the other thread does: embeds the run's captions, so that pictures can be described, and saves the encoder."""

        def show(count, total):
            if self.stopped.is_set():
                raise Stopped
            self.captions_note = f"{count:,} of {total:,} captions embedded" if count < total else ""

        try:
            self.captions = embed_captions(self.searcher, show)
            self.captions_note = ""
            with self.busy:  # what exports it may patch torch for all threads
                self.searcher.save_text_encoder()
        except Stopped:
            pass
        except Exception as error:  # of any kind, as for the pictures
            self.captions_note = f"no captions for pictures: {reason(error)}"
            print(self.captions_note, flush=True)

    def notes(self):
        """What the page says beside the number of pictures: a list of short texts."""
        left_out = f"{self.left_out:,} cannot be read" if self.left_out else ""
        return [note for note in (left_out, self.captions_note) if note]

    def stop(self):
        self.stopped.set()


def identity(folder):
    """What tells a folder from another one of its name; None where there is none."""
    try:
        stat = os.stat(folder)
    except OSError:
        return None
    return stat.st_dev, stat.st_ino


def reason(error):
    """What an error says, as one line."""
    return printable(str(error).strip().partition("\n")[0]) or type(error).__name__
