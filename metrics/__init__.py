"""From features and images to figures: FID, sFID, IS, precision and recall, PSNR, SSIM, LPIPS."""
