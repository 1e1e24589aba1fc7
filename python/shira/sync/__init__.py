"""Live updates: weights that follow a trainer, with every step checked and every step reversible.

A trainer publishes what has changed since it published last (`Publisher`), and whoever serves the model takes it over
in place (`Receiver`)::

    publisher = shira.sync.Publisher(model)             # at the trainer
    ...                                                 # some steps of training
    data = publisher.publish().to_bytes()

    receiver = shira.sync.Receiver(model)               # at the server, the same weights
    receiver.stage(shira.sync.Update.from_bytes(data))  # checked, and on the weights' devices; nothing has changed
    receiver.commit()                                   # the weights change, all or none of them
    receiver.rollback()                                 # and are what they were, bit for bit

Both sides work with O(changed entries): there is no dense copy of a weight on the way. Versions chain the updates: an
update says which weights it starts from (by their fingerprints) and which it leads to, so that one that was lost, came
twice or came out of order is refused.
"""

from shira.sync.folder import Folder
from shira.sync.plan import Box, Plan
from shira.sync.publisher import Publisher
from shira.sync.receiver import Receiver
from shira.sync.update import SyncError, Update, compose

__all__ = ["Box", "Folder", "Plan", "Publisher", "Receiver", "SyncError", "Update", "compose"]
