"""Several processes that train one model: each keeps an extent of every chunk, and asks the others for theirs.

::

    chunks --gather, send, agree--> Peers (the communicator)
                                      |-- Fetches    asks owners for what they have at home
                                      |-- Service    answers the others from our homes
                                      |-- Reduction  sends gradients (Shipping), brings those that come into the order
                                      |              of ranks (Rounds), and has them added (Sums)
                                      |-- Votes      agrees on what all are about to do
                                      |-- Errands    waits for what the first rank does alone
                                      |-- Farewell   serves the others to the end
                                      '-- Mailbox    letters and tensors, point to point, over a Gloo group

No exchange of data is a collective, so that ranks may differ in what they need, and when. What changes the homes (a
step, loading, an edit) is agreed: see `votes`.
"""

from .join import group_of, join
from .peers import Peers

__all__ = ["Peers", "group_of", "join"]
