{{/* Access modes of the volume for models. Takes spec. */}}
{{- define "expertsteer.accessModes" -}}
{{- .spec.pvcAccessMode | default (list "ReadWriteOnce") | toYaml -}}
{{- end -}}

{{/* "true" where the volume for models can be used by one pod, or by the pods of one node. Takes spec. */}}
{{- define "expertsteer.onePod" -}}
{{- $modes := include "expertsteer.accessModes" . | fromYamlArray -}}
{{- if and (kindIs "string" .spec.pvcStorage) (not (has "ReadWriteMany" $modes)) (not (has "ReadOnlyMany" $modes)) -}}true{{- end -}}
{{- end -}}

{{/*
Volumes of the pod and their mounts, under the keys `volumes` and `mounts`. Takes root, spec, steering.
*/}}
{{- define "expertsteer.volumes" -}}
{{- $engine := .root.Values.servingEngineSpec -}}
{{- $name := include "expertsteer.name" . -}}
{{- $config := .spec.vllmConfig | default dict -}}
{{- $volumes := list (dict "name" "tmp" "emptyDir" dict) (dict "name" "cache" "emptyDir" dict) -}}
{{- $mounts := list (dict "name" "tmp" "mountPath" "/tmp") (dict "name" "cache" "mountPath" "/var/cache/expertsteer") -}}
{{- $mode := .steering.registry.mode -}}
{{- if ne $mode "none" -}}
{{- /* The folder above the registry's: a file system's root holds more than the registry. */ -}}
{{- $mounts = append $mounts (dict "name" "registry" "mountPath" "/var/lib/expertsteer") -}}
{{- end -}}
{{- if eq $mode "manifest" -}}
{{- $volumes = append $volumes (dict "name" "registry" "emptyDir" dict) -}}
{{- end -}}
{{- if or (hasKey $config "tensorParallelSize") (hasKey $config "pipelineParallelSize") (hasKey $config "dataParallelSize") (hasKey .spec "shmSize") -}}
{{- $volumes = append $volumes (dict "name" "shm" "emptyDir" (dict "medium" "Memory" "sizeLimit" (.spec.shmSize | default "20Gi"))) -}}
{{- $mounts = append $mounts (dict "name" "shm" "mountPath" "/dev/shm") -}}
{{- end -}}
{{- if hasKey .spec "pvcStorage" -}}
{{- if kindIs "map" .spec.pvcStorage -}}
{{- $volumes = append $volumes (dict "name" "storage" "emptyDir" (.spec.pvcStorage.emptyDir | default dict)) -}}
{{- else -}}
{{- $volumes = append $volumes (dict "name" "storage" "persistentVolumeClaim" (dict "claimName" (printf "%s-storage-claim" $name))) -}}
{{- end -}}
{{- $mounts = append $mounts (dict "name" "storage" "mountPath" "/data") -}}
{{- end -}}
{{- if include "expertsteer.declares" . -}}
{{- /* The folder, not the file: a file that is mounted alone never changes. */ -}}
{{- $volumes = append $volumes (dict "name" "bundles" "configMap" (dict "name" (include "expertsteer.bundlesName" .))) -}}
{{- $mounts = append $mounts (dict "name" "bundles" "mountPath" "/etc/expertsteer/bundles" "readOnly" true) -}}
{{- end -}}
{{- with include "expertsteer.secretRef" (dict "root" .root "value" .steering.keys "key" "keys.yaml") | fromYaml -}}
{{- if .name -}}
{{- $items := list (dict "key" .key "path" "keys.yaml") -}}
{{- $volumes = append $volumes (dict "name" "keys" "secret" (dict "secretName" .name "items" $items "defaultMode" 0o440)) -}}
{{- $mounts = append $mounts (dict "name" "keys" "mountPath" "/etc/expertsteer/keys" "readOnly" true) -}}
{{- end -}}
{{- end -}}
{{- if ne .steering.signatures.mode "off" -}}
{{- $volumes = append $volumes (dict "name" "signature-keys" "configMap" (dict "name" .steering.signatures.configMap)) -}}
{{- $mounts = append $mounts (dict "name" "signature-keys" "mountPath" "/etc/expertsteer/signature-keys" "readOnly" true) -}}
{{- end -}}
{{- if .spec.chatTemplate -}}
{{- $volumes = append $volumes (dict "name" "chat-templates" "configMap" (dict "name" (printf "%s-chat-templates" $name))) -}}
{{- $mounts = append $mounts (dict "name" "chat-templates" "mountPath" "/templates" "readOnly" true) -}}
{{- end -}}
{{- $volumes = concat $volumes ($engine.extraVolumes | default list) (.spec.extraVolumes | default list) -}}
{{- $mounts = concat $mounts ($engine.extraVolumeMounts | default list) (.spec.extraVolumeMounts | default list) -}}
{{- dict "volumes" $volumes "mounts" $mounts | toYaml -}}
{{- end -}}
