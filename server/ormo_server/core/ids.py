"""What slots and tickets are told apart by."""

# A worker id and the number of one of its slots.
SlotKey = tuple[str, int]
# An epoch of the server and a number within it.
TicketKey = tuple[int, int]
