"""The settings of training/finetune_lora.py and what is wrong with them."""

from __future__ import annotations

import dataclasses
from typing import Literal

from gigdiff.consistency import knot_timesteps
from gigdiff.errors import InputError
from gigdiff.precision import training_precision

__all__ = ["LoraConfig", "check"]


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Keys of configs/lora_*.yaml. Names are those of diffusers' example scripts where they have one.

    Args:
        pretrained_model_name_or_path: an embedded model, a folder or a hub id; SD 1.5, SDXL, SD3, FLUX layouts.
        train_data_dir: folder of photos (imagefolder or Parquet); or use dataset_name. Neither: the sample photos.
        dataset_name: hub id of a dataset.
        image_column: column of the photos.
        caption_column: column of captions (or of lists of captions); known names are found without it.
        train_split: split to train on.
        validation_split: split of the held-out loss; by default a part of the training products is held out.
        validation_fraction: how large a part.
        max_train_samples: use only the first so many photos.
        max_validation_samples: hold out at most so many.
        max_bad_images: unreadable photos to skip and list; more are an error.
        output_dir: run folder: pytorch_lora_weights.safetensors, checkpoints, log.jsonl, previews/, best/.
        cache_dir: where latents and text embeddings are kept.
        resolution: side of a square with as many pixels as photos are brought to; None = the model's own size.
        aspect_ratio_buckets: photos of other shapes are trained in their own shape; false = all at one size.
        bucket_multiple: bucket heights and widths are multiples of this.
        max_aspect_ratio: longest over shortest side of buckets.
        image_fit: "pad" keeps the photo whole in a white frame, "crop" fills the bucket and cuts off what sticks out.
        random_flip: mirror half of the samples (it mirrors prints and logos).
        captions_per_image: captions composed from attributes for photos that have none of their own.
        instance_prompt: one caption for all photos, such as "a photo of sks shoe".
        caption_dropout: share of samples trained on the empty prompt, for guidance.
        max_sequence_length: T5's tokens (SD3, FLUX).
        with_prior_preservation: also train on pictures that the base model drew, so that what it knew is not lost.
        class_prompt: the prompt of those pictures.
        class_prompts: several, drawn in turn: a new family of products takes the place of all others without them.
        class_data_dir: where they are kept; by default in output_dir.
        num_class_images: how many are drawn, if there are fewer.
        prior_loss_weight: weight of their loss.
        rank: of the LoRA.
        lora_alpha: scale is lora_alpha / rank; None = rank.
        lora_dropout: dropout on the LoRA's input.
        target_modules: layers that get a LoRA; None = attention projections.
        use_dora: weight-decomposed LoRA.
        use_rslora: scale is lora_alpha / sqrt(rank).
        init_lora_weights: lora_A's random start: "kaiming" (peft's own: smaller, the wider the layer) or "gaussian" (of
            deviation 1 / rank, as in diffusers' script: larger, so a lower learning_rate fits).
        train_text_encoder: a LoRA for the CLIP text encoders too (text is then not cached).
        train_batch_size: photos a step and process.
        gradient_accumulation_steps: steps whose gradients are averaged before each update.
        gradient_checkpointing: recompute activations in the backward pass: less memory, more time.
        max_train_steps: updates in all.
        learning_rate: peak of the schedule.
        text_encoder_lr: of the text encoders' LoRA; None = learning_rate.
        lr_warmup_steps: linear warm-up.
        lr_decay_fraction: last part of the run that decays by a cosine.
        use_8bit_adam: bitsandbytes' AdamW8bit.
        adam_beta1: AdamW.
        adam_beta2: AdamW.
        adam_weight_decay: AdamW.
        adam_epsilon: AdamW.
        max_grad_norm: gradient clipping.
        objective: "denoising", or "consistency": the LoRA makes the model draw in 1 to 8 steps without guidance
            (LCM-LoRA, Luo et al. 2023, arXiv 2311.05556), by what the guided base model draws; not for SD3 and FLUX.
        distill_guidance_scale: of "consistency": the base model's guidance, which the LoRA learns.
        distill_knots: of "consistency": noise levels that the LoRA learns; 50 is LCMScheduler's own number.
        snr_gamma: min-SNR weighting of the loss (5 is usual); not for SD3 and FLUX.
        noise_offset: noise added to whole channels, for very dark or bright pictures (0.1 is usual).
        train_guidance: what a guidance-distilled FLUX is fed in training.
        use_ema: average the LoRA's weights; the average is validated, previewed and saved.
        ema_decay: of that average.
        mixed_precision: "no", "bf16", "fp16" (GPU), or "auto": bf16 where the device computes in it, else no. The
            LoRA's own weights are float32 in each.
        attention: backend, see gigdiff.attention.
        seed: of everything.
        checkpointing_steps: steps between checkpoints.
        checkpoints_total_limit: how many are kept.
        resume_from_checkpoint: "latest" or a checkpoint's name.
        validation_steps: steps between held-out losses.
        early_stopping_patience: stop when so many held-out losses in a row were no better than the best.
        preview_steps: steps between previews; None = validation_steps.
        validation_prompt: a prompt to preview.
        validation_prompts: several; by default captions of held-out photos.
        num_validation_images: previews of each prompt, with seeds 0, 1, ...
        num_inference_steps: of previews; None = the model's default.
        guidance_scale: of previews; None = the model's default.
        report_to: tracker of Accelerate, "tensorboard" or "none".
        output_kohya_format: also write kohya_lora_weights.safetensors.
    """

    pretrained_model_name_or_path: str = "mini"
    train_data_dir: str | None = None
    dataset_name: str | None = None
    image_column: str = "image"
    caption_column: str | None = None
    train_split: str = "train"
    validation_split: str | None = None
    validation_fraction: float = 0.1
    max_train_samples: int | None = None
    max_validation_samples: int = 64
    max_bad_images: int = 10
    output_dir: str = "runs/lora"
    cache_dir: str = "cache"
    resolution: int | None = None
    aspect_ratio_buckets: bool = True
    bucket_multiple: int = 64
    max_aspect_ratio: float = 2.0
    image_fit: Literal["pad", "crop"] = "pad"
    random_flip: bool = False
    captions_per_image: int = 4
    instance_prompt: str | None = None
    caption_dropout: float = 0.1
    max_sequence_length: int = 256
    with_prior_preservation: bool = False
    class_prompt: str | None = None
    class_prompts: tuple[str, ...] = ()
    class_data_dir: str | None = None
    num_class_images: int = 100
    prior_loss_weight: float = 1.0
    rank: int = 16
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] | None = None
    use_dora: bool = False
    use_rslora: bool = False
    init_lora_weights: Literal["kaiming", "gaussian"] = "kaiming"
    train_text_encoder: bool = False
    train_batch_size: int = 4
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    max_train_steps: int = 1000
    learning_rate: float = 1e-4
    text_encoder_lr: float | None = None
    lr_warmup_steps: int = 20
    lr_decay_fraction: float = 0.3
    use_8bit_adam: bool = False
    adam_beta1: float = 0.9
    adam_beta2: float = 0.99
    adam_weight_decay: float = 0.01
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    objective: Literal["denoising", "consistency"] = "denoising"
    distill_guidance_scale: float = 7.5
    distill_knots: int = 50
    snr_gamma: float | None = None
    noise_offset: float = 0.0
    train_guidance: float = 1.0
    use_ema: bool = True
    ema_decay: float = 0.99
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "no"
    attention: str = "auto"
    seed: int = 0
    checkpointing_steps: int = 200
    checkpoints_total_limit: int = 2
    resume_from_checkpoint: str | None = None
    validation_steps: int = 100
    early_stopping_patience: int | None = None
    preview_steps: int | None = None
    validation_prompt: str | None = None
    validation_prompts: tuple[str, ...] = ()
    num_validation_images: int = 2
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    report_to: str = "none"
    output_kohya_format: bool = False

    def prompts_of_class(self) -> tuple[str, ...]:
        """Of prior preservation: --class_prompt and --class_prompts."""
        return tuple(filter(None, (self.class_prompt, *self.class_prompts)))


def check(config: LoraConfig) -> None:
    """What can be told before anything is loaded. Raises InputError naming the flag."""
    for name in ("train_batch_size", "gradient_accumulation_steps", "max_train_steps", "checkpointing_steps",
                 "validation_steps", "captions_per_image", "rank", "num_validation_images"):  # fmt: skip
        if getattr(config, name) < 1:
            raise InputError(f"--{name} {getattr(config, name)}: 1 or more is allowed")
    for name in ("caption_dropout", "lora_dropout", "validation_fraction", "ema_decay"):
        if not 0 <= getattr(config, name) < 1:
            raise InputError(f"--{name} {getattr(config, name):g}: from 0 to below 1 is allowed")
    if config.train_data_dir and config.dataset_name:
        raise InputError("--train_data_dir and --dataset_name were both given; give one.")
    if config.with_prior_preservation and not config.prompts_of_class():
        raise InputError(
            '--with_prior_preservation needs --class_prompt, such as "a photo of a shoe", or --class_prompts.'
        )
    training_precision(config.mixed_precision)
    if config.objective == "consistency":
        knot_timesteps(config.distill_knots)
        if config.train_text_encoder or config.snr_gamma is not None or config.with_prior_preservation:
            raise InputError(
                "--objective consistency goes without --train_text_encoder, --snr_gamma and --with_prior_preservation: "
                "what it learns comes from the base model alone."
            )
