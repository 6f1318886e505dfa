// How many blocks of a cluster the device can hold. Eight on a whole GPU of capability 9.0; a part
// of one (MIG) may have no GPC of so many multiprocessors, and would refuse the launch.
#pragma once

namespace resnet_fused::sm90 {

// Of the kernels that split a reduction, on the current device: 8, 4, 2, or 1 where none fits; 8,
// too, where the driver does not say. Asks the driver at every call.
int largest_cluster();

}  // namespace resnet_fused::sm90
