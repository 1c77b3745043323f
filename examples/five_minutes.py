"""A five-minute introduction: a list of tensors, a DataLoader, and PadCollator.

Every batch has its lengths. The mask, the packed run, the loss and the original order follow from them.
"""

import torch
from torch import nn
from torch.utils.data import DataLoader

from collate import PadCollator, apply_rnn, sequence_loss


def main() -> None:
    """Train a tagger: after each bit, is the sum so far odd? Print the loss and one batch."""
    torch.manual_seed(0)
    inputs = [torch.randint(0, 2, (length,)) for length in torch.randint(1, 30, (512,)).tolist()]
    samples = [{"bits": bits, "odd": bits.cumsum(0) % 2} for bits in inputs]
    loader = DataLoader(samples, batch_size=32, shuffle=True, collate_fn=PadCollator({"bits": 0, "odd": -100}))

    embedding, rnn, head = nn.Embedding(2, 8), nn.GRU(8, 32), nn.Linear(32, 2)
    optimizer = torch.optim.Adam([*embedding.parameters(), *rnn.parameters(), *head.parameters()], lr=0.01)
    for epoch in range(8):
        for batch in loader:
            hidden, _ = apply_rnn(rnn, batch["bits"].map(embedding))
            loss = sequence_loss(nn.CrossEntropyLoss(reduction="none"), hidden.map(head), batch["odd"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch}: loss {loss.item():.4f}")
    print(batch["bits"])
    print("in source order:", batch["bits"].unsort().lengths.tolist()[:8], "...")


if __name__ == "__main__":
    main()
