"""A module that must not be preloaded: its import starts a thread, which no forked process would have."""

import threading

threading.Thread(target=threading.Event().wait, name="stays", daemon=True).start()
