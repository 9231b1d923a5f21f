"""Connections to the page: bounded in number and in time, so that requests which never end do not keep others out."""

from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_CONNECTIONS = 200  # at once; of more, the oldest one whose request has not come yet is closed
HEADER_SECONDS = 10  # in which the lines before a request's body must have come


class BoundedProtocol(H11Protocol):
    """uvicorn's protocol with these bounds, which it has none for; its own limit refuses new requests, not stalled ones."""

    def connection_made(self, transport):
        super().connection_made(transport)
        self.loop.call_later(HEADER_SECONDS, self.close_without_request)
        order = self.app_state.setdefault("connections", {})  # one for the server; a dict keeps the order
        order[self] = None
        if len(order) > MAX_CONNECTIONS:
            oldest = next((other for other in order if other.waits_for_client()), self)
            oldest.transport.abort()

    def connection_lost(self, exc):
        self.app_state["connections"].pop(self, None)
        super().connection_lost(exc)

    def waits_for_client(self):
        """Whether the client has to send something before there is more to do."""
        has_request = self.cycle and not self.cycle.response_complete and not self.cycle.more_body
        return not has_request and not self.transport.is_closing()

    def close_without_request(self):
        if not self.cycle and not self.transport.is_closing():
            self.transport.abort()
