"""Train a small CLIP image tower from scratch, by cosine classification.

    python examples/offline/pretrain.py FOLDER --output TOWER   # FOLDER/<class>/.../<image>

The classes have learned vectors; an image's logits are its cosines with them, divided by a
temperature. What is saved is the tower alone, in float16, with its image processor.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from pairclip import LabelledImages

SIDE = 32
TEMPERATURE = 0.07


class Images(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
    """Images of a folder, cropped and mirrored at random."""

    def __init__(self, folder: Path, processor: CLIPImageProcessor) -> None:
        self.images = LabelledImages(str(folder))
        self.transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(SIDE, scale=(0.5, 1.0)),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(processor.image_mean, processor.image_std),
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """Pixels and class id."""
        image, label = self.images[index]
        return self.transform(image), label


def main(arguments: list[str] | None = None) -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, help="images, in a folder for each class")
    parser.add_argument("--output", type=Path, required=True, help="where the tower goes")
    parser.add_argument("--epochs", type=int, default=6, help="passes (default: 6)")
    parser.add_argument("--batch-size", type=int, default=256, help="images (default: 256)")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="peak (default: 1e-3)")
    parser.add_argument("--num-workers", type=int, default=2, help="loading (default: 2)")
    args = parser.parse_args(arguments)

    torch.manual_seed(0)
    sides = {"height": SIDE, "width": SIDE}
    processor = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=sides)
    config = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=4,
        projection_dim=128,
    )
    images = Images(args.folder, processor)
    loader = DataLoader(
        images, args.batch_size, shuffle=True, drop_last=True, num_workers=args.num_workers
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tower = CLIPVisionModelWithProjection(config).to(device)
    classes = nn.Parameter(torch.randn(len(images.images.class_names or []), 128, device=device))
    parameters = [*tower.parameters(), classes]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.learning_rate, epochs=args.epochs, steps_per_epoch=len(loader)
    )
    for epoch in range(args.epochs):
        right = 0
        for pixels, labels in loader:
            embeddings = tower(pixel_values=pixels.to(device)).image_embeds
            cosines = nn.functional.normalize(embeddings) @ nn.functional.normalize(classes).T
            loss = nn.functional.cross_entropy(cosines / TEMPERATURE, labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            right += int((cosines.argmax(dim=1).cpu() == labels).sum())
        seen = len(loader) * args.batch_size
        print(f"epoch {epoch + 1}: {right / seen:.3f} of {seen} images right", flush=True)
    tower.half().save_pretrained(args.output)
    processor.save_pretrained(args.output)


if __name__ == "__main__":
    main()
